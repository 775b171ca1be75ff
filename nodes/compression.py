"""Making concepts small."""

from typing import Any

from comfy_api.latest import io

from ..compression.ranks import compress
from ..compression.spectrum_plot import spectrum_plot
from ..host.comfyui.inputs import project_in_comfyui
from ..pictures.tensors import to_tensor
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
        tooltip="Largest size of the file that Save Concept writes in half precision. Lower it "
        "for a smaller file, raise it if the look suffers.",
    ),
    "share of energy": _share(
        "energy_share",
        0.95,
        "How much of the squared change to keep, over all layers. 0.95 is careful, 0.8 makes a "
        "small file.",
    ),
    "share of singular values": _share(
        "nuclear_share",
        0.6,
        "How much of the sum of each layer's singular values to keep. The paper uses 0.6; raise "
        "it if the look suffers.",
    ),
    "rank": io.Int.Input(
        "rank",
        default=16,
        min=1,
        max=2048,
        tooltip="The rank of every layer. Lower it for a smaller file, raise it if the look "
        "suffers.",
    ),
    "own words": io.Clip.Input(
        "clip",
        tooltip="The CLIP of the base checkpoint. What the concept does at its own words is kept, "
        "in a hundredth of the size; what it does at other words is dropped.",
    ),
}


class CompressConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CompressConcept",
            display_name="Compress Concept",
            category=CATEGORY,
            description="Makes a concept's file several times smaller and keeps its look as well "
            "as that size allows.",
            search_aliases=["svd", "resize lora", "low rank", "shrink concept"],
            inputs=[
                Concept.Input(
                    "concept", tooltip="The concept to shrink. A merged one is small already."
                ),
                io.DynamicCombo.Input(
                    "target",
                    options=[
                        io.DynamicCombo.Option(name, [value]) for name, value in _TARGETS.items()
                    ],
                    tooltip="How to choose the size. own words makes the smallest file; the others "
                    "keep some of what the concept does at every word.",
                ),
            ],
            outputs=[
                Concept.Output(display_name="concept"),
                io.Image.Output(
                    display_name="spectrum",
                    tooltip="How much of each layer a rank keeps, with dots where layers were cut.",
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
        return io.NodeOutput(compressed, to_tensor(picture)[None], ui=said)


NODES = [CompressConcept]
