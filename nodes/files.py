"""Concepts on disk."""

from typing import Any

import torch
from comfy_api.latest import io

from ..concept.file import size_of, write_new_concept
from ..concept.naming import safe_file_name
from ..formats.exporting import FORMATS, export_concept
from ..formats.importing import companions, open_concept
from ..host.comfyui.inputs import file_fingerprint
from ..host.comfyui.models.weights import base_model
from ..host.comfyui.paths import concept_files, concept_folder, concept_path, export_folder
from .types import CATEGORY, Concept, told

PRECISIONS = {"half (fp16)": torch.float16, "full (fp32)": torch.float32}


class LoadConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadConcept",
            display_name="Load Concept",
            category=CATEGORY,
            description="Loads a concept from models/custom_diffusion. Other tools' files in there "
            "open too: Custom Diffusion deltas, LoRAs, textual-inversion embeddings.",
            search_aliases=["load custom diffusion", "load delta", "import concept", "load lora"],
            inputs=[
                io.Combo.Input(
                    "concept_name",
                    options=concept_files(),
                    tooltip="The file in models/custom_diffusion. Press R to refresh the list "
                    "after adding one.",
                ),
                io.String.Input(
                    "rename_token",
                    display_name="new_trigger_word",
                    default="",
                    advanced=True,
                    tooltip="Another trigger word for this concept, <mine> for example. Use it "
                    "when two concepts have the same one; the file is not changed.",
                ),
                io.String.Input(
                    "class_noun",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Only for another tool's file, which has none: the everyday word for "
                    "the subject. Fill it in before a merge.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Only for another tool's file with whole weights, DoRA, OFT, IA3 or "
                    "GLoRA: the base model it was trained on, to find out what it changed.",
                ),
            ],
            outputs=[Concept.Output(display_name="concept")],
        )

    @classmethod
    def fingerprint_inputs(cls, concept_name: str, **others: object) -> str:
        path = concept_path(concept_name)
        files = "".join(file_fingerprint(file) for file in (path, *companions(path)))
        return files + repr(sorted(others.items()))

    @classmethod
    def execute(
        cls, concept_name: str, rename_token: str, class_noun: str = "", model: Any = None
    ) -> io.NodeOutput:
        base = None if model is None else base_model(model)
        opened = open_concept(concept_path(concept_name), base, class_noun.strip())
        concept = opened.concept
        if rename_token.strip():
            concept = concept.with_token(rename_token.strip())
        if not opened.foreign:
            return io.NodeOutput(concept)
        lines = (f"From {opened.title}: {concept.describe()}", *opened.facts)
        return io.NodeOutput(concept, ui=told(*lines, warnings=opened.notes))


class SaveConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveConcept",
            display_name="Save Concept",
            category=CATEGORY,
            description="Saves a concept in models/custom_diffusion and never replaces a file. "
            "Copied to models/loras, its weights work in ComfyUI's own LoRA loader.",
            is_output_node=True,
            inputs=[
                Concept.Input(
                    "concept", tooltip="The concept to save: merged, renamed or compressed."
                ),
                io.String.Input(
                    "name",
                    default="my-concept",
                    tooltip="Name of the file. A number is added if the name is taken.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    advanced=True,
                    tooltip="half (fp16) is enough for drawing. full (fp32) keeps every digit, in "
                    "twice the size.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, concept: Any, name: str, precision: str) -> io.NodeOutput:
        path = write_new_concept(concept, concept_folder(), name, PRECISIONS[precision])
        return io.NodeOutput(ui=told(f"{path.name}, {size_of(path)}"))


class ExportConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExportConcept",
            display_name="Export Concept",
            category=CATEGORY,
            description="Saves a concept as another tool's file. LoRAs and embeddings go where "
            "ComfyUI's own loaders find them, the rest to output/custom_diffusion/exported.",
            search_aliases=["save lora", "convert concept", "diffusers", "kohya"],
            is_output_node=True,
            inputs=[
                Concept.Input("concept", tooltip="The concept to save as another tool's file."),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    tooltip="The tool that will open the file. A LoRA lacks the trigger word, so "
                    "export embeddings as well.",
                ),
                io.String.Input(
                    "name",
                    default="my-concept",
                    tooltip="Name of the file. A number is added if the name is taken.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    advanced=True,
                    tooltip="half (fp16) is enough for drawing. full (fp32) keeps every digit, in "
                    "twice the size.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Only for compvis, adobe and hugging-face, which hold whole weights: "
                    "the base model of the concept.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(
        cls, concept: Any, format: str, name: str, precision: str, model: Any = None
    ) -> io.NodeOutput:
        needed = model is not None and FORMATS[format].needs_base
        base = base_model(model) if needed else None
        path = export_folder(format) / safe_file_name(name)
        paths = export_concept(
            concept, path, format, base, PRECISIONS[precision], number_if_taken=True
        )
        sizes = [f"{path}, {size_of(path)}" for path in paths]
        return io.NodeOutput(ui=told(FORMATS[format].title, *sizes))


NODES = [LoadConcept, SaveConcept, ExportConcept]
