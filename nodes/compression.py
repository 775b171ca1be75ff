"""Making concepts small."""

from typing import Any

import numpy as np
import torch
from comfy_api.latest import io

from ..compression.ranks import compress
from ..compression.spectrum_plot import spectrum_plot
from ..host.comfyui.inputs import project_in_comfyui
from .types import CATEGORY, Concept, told, without_leftovers


def _share(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        name, default=default, min=0.01, max=1.0, step=0.01, round=False, tooltip=tooltip
    )


# An input is named like the target that `compress` takes.
_TARGETS = {
    "size in MB": io.Float.Input(
        "megabytes",
        default=5.0,
        min=0.01,
        max=2000.0,
        step=0.1,
        round=False,
        tooltip="The file in half precision is no larger. Layers get ranks so that it keeps the "
        "most.",
    ),
    "share of energy": _share(
        "energy_share",
        0.95,
        "Of the squared change, over all layers. Layers get ranks so that the file is smallest.",
    ),
    "share of singular values": _share(
        "nuclear_share",
        0.6,
        "Of the sum of each layer's singular values, as in the paper, which takes 0.6.",
    ),
    "rank": io.Int.Input("rank", default=16, min=1, max=2048, tooltip="The same for every layer."),
    "own words": io.Clip.Input(
        "clip",
        tooltip="The text encoder of the base model. What the concept does at its own words is "
        "kept, a hundredth of the size; what it does elsewhere goes.",
    ),
}


class CompressConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CompressConcept",
            display_name="Compress Concept",
            category=CATEGORY,
            description="Makes a concept several times smaller: of every layer the low-rank "
            "matrix that is nearest to it.",
            search_aliases=["svd", "resize lora", "low rank", "shrink concept"],
            inputs=[
                Concept.Input("concept"),
                io.DynamicCombo.Input(
                    "target",
                    options=[
                        io.DynamicCombo.Option(name, [value]) for name, value in _TARGETS.items()
                    ],
                    tooltip="What says how small.",
                ),
            ],
            outputs=[
                Concept.Output(display_name="concept"),
                io.Image.Output(
                    display_name="spectrum",
                    tooltip="Singular values added up, with dots where layers were cut.",
                ),
            ],
        )

    @classmethod
    @without_leftovers
    def execute(cls, concept: Any, target: Any) -> io.NodeOutput:
        value = {name: given for name, given in target.items() if name != "target"}
        if "clip" in value:
            compressed, rows = project_in_comfyui(value["clip"], concept)
            picture = spectrum_plot(concept, ranks=dict.fromkeys(concept.layers, rows.shared_rows))
            said = told(*rows.summary(), warnings=rows.warnings())
        else:
            compressed, report = compress(concept, **value)
            picture = spectrum_plot(concept, report.spectra, report.ranks())
            said = told(*report.summary())
        image_bhwc = torch.from_numpy(np.array(picture)).float()[None] / 255
        return io.NodeOutput(compressed, image_bhwc, ui=said)


NODES = [CompressConcept]
