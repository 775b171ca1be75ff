"""Concepts on disk."""

import torch
from comfy_api.latest import io

from ..concept.file import read_concept, write_new_concept
from ..host.comfyui.inputs import file_fingerprint
from ..host.comfyui.paths import concept_files, concept_folder, concept_path
from .types import CATEGORY, Concept, told

PRECISIONS = {"half (fp16)": torch.float16, "full (fp32)": torch.float32}


class LoadConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadConcept",
            display_name="Load Concept",
            category=CATEGORY,
            description="Loads a concept from models/custom_diffusion.",
            search_aliases=["load custom diffusion", "load delta"],
            inputs=[
                io.Combo.Input("concept_name", options=concept_files()),
                io.String.Input(
                    "rename_token",
                    default="",
                    advanced=True,
                    tooltip="Another modifier token for a concept that has one, when two concepts "
                    "use the same.",
                ),
            ],
            outputs=[Concept.Output(display_name="concept")],
        )

    @classmethod
    def fingerprint_inputs(cls, concept_name: str, rename_token: str) -> str:
        return file_fingerprint(concept_path(concept_name)) + rename_token

    @classmethod
    def execute(cls, concept_name: str, rename_token: str) -> io.NodeOutput:
        concept = read_concept(concept_path(concept_name))
        if rename_token.strip():
            concept = concept.with_token(rename_token.strip())
        return io.NodeOutput(concept)


class SaveConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveConcept",
            display_name="Save Concept",
            category=CATEGORY,
            description="Saves a concept in models/custom_diffusion; an existing file is never "
            "replaced. Copied to models/loras, its weights work in ComfyUI's own LoRA loader.",
            is_output_node=True,
            inputs=[
                Concept.Input("concept"),
                io.String.Input("name", default="my-concept"),
                io.Combo.Input("precision", options=list(PRECISIONS), advanced=True),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, concept, name: str, precision: str) -> io.NodeOutput:
        path = write_new_concept(concept, concept_folder(), name, PRECISIONS[precision])
        return io.NodeOutput(ui=told(f"{path.name}, {path.stat().st_size / 1e6:.1f} MB"))


NODES = [LoadConcept, SaveConcept]
