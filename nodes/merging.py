"""Combining concepts that were trained separately."""

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..host.comfyui.inputs import (
    BUILT_IN_CAPTIONS,
    caption_files,
    captions_fingerprint,
    distances_in_comfyui,
    merge_in_comfyui,
)
from ..merge.distance import distance_table
from ..merge.merging import DEFAULT_RELATIVE_RIDGE
from ..merge.report import MergeReport
from .types import CATEGORY, Concept, chosen_concepts, concepts_input, told, without_leftovers


class ConceptMerge(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptMerge",
            display_name="Concept Merge",
            category=CATEGORY,
            description="Combines concepts into one, without training. Each keeps its look at its "
            "own words, and everything else stays close to the base model.",
            search_aliases=["combine concepts", "merge lora", "composition"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The CLIP of the base checkpoint, straight from its loader, without "
                    "concepts.",
                ),
                concepts_input(
                    2, "How many concepts to merge. The inputs below follow this number."
                ),
                captions_input(),
                io.Float.Input(
                    "relative_ridge",
                    default=DEFAULT_RELATIVE_RIDGE,
                    min=0.0,
                    max=1.0,
                    step=1e-5,
                    round=False,
                    advanced=True,
                    tooltip="Keeps the change small where the captions say little. Raise it only "
                    "if the report warns of a large change.",
                ),
            ],
            outputs=[
                Concept.Output(display_name="concept"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, regularization_captions: str, **inputs: object) -> str:
        return captions_fingerprint(regularization_captions)

    @classmethod
    @without_leftovers
    def execute(
        cls, clip: Any, concepts: Any, regularization_captions: Any, relative_ridge: Any
    ) -> io.NodeOutput:
        given, strengths = zip(*chosen_concepts(concepts), strict=True)
        merged, report = merge_in_comfyui(
            clip,
            given,
            strengths,
            regularization_captions,
            relative_ridge,
        )
        return io.NodeOutput(merged, report.text(), ui=_told(given, report))


def captions_input(purpose: str = "What the merged model must keep drawing as before.") -> io.Input:
    return io.Combo.Input(
        "regularization_captions",
        options=caption_files(),
        default=BUILT_IN_CAPTIONS,
        advanced=True,
        tooltip=f"{purpose} Use built-in, or a .txt file in ComfyUI's input folder with one "
        "caption per line.",
    )


def _told(concepts: Sequence[Any], report: MergeReport) -> dict[str, Any]:
    table = [("concept", "kept words", "largest error")]
    for number, (concept, residual) in enumerate(zip(concepts, report.residuals, strict=True)):
        words = ", ".join(report.kept(number))
        table.append((concept.describe(), words, f"{residual:.2%}"))
    return told(*report.summary(), warnings=report.warnings(), table=table)


class ConceptDistance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptDistance",
            display_name="Concept Distance",
            category=CATEGORY,
            description="Says how close two concepts are before you merge them: what they share, a "
            "merge cannot tell apart.",
            search_aliases=["compare concepts", "similar concepts", "before merge"],
            is_output_node=True,
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The CLIP of the base checkpoint, straight from its loader.",
                ),
                Concept.Input("concept", tooltip="One of the two. It is not changed."),
                Concept.Input("other", tooltip="The concept to compare it with."),
                captions_input(),
            ],
            outputs=[io.Float.Output(display_name="overlap")],
        )

    @classmethod
    def fingerprint_inputs(cls, regularization_captions: str, **inputs: object) -> str:
        return captions_fingerprint(regularization_captions)

    @classmethod
    def execute(
        cls, clip: Any, concept: Any, other: Any, regularization_captions: str
    ) -> io.NodeOutput:
        pairs = distances_in_comfyui(clip, [concept, other], regularization_captions)
        names = [concept.describe(), other.describe()]
        return io.NodeOutput(pairs[0].overlap, ui=told(table=distance_table(pairs, names)))


NODES = [ConceptMerge, ConceptDistance]
