"""Looking at concepts and models."""

from typing import Any

from comfy_api.latest import io

from ..host.comfyui.inspection import compare_models, fit_to_model
from ..inspection.report import inspect_concept
from .types import CATEGORY, Concept, told


class InspectConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InspectConcept",
            display_name="Inspect Concept",
            category=CATEGORY,
            description="Shows what a concept teaches, what it changes in each layer, where it "
            "came from, and whether it fits a model.",
            search_aliases=["concept info", "show concept", "metadata", "spectrum"],
            is_output_node=True,
            inputs=[
                Concept.Input("concept", tooltip="The concept to look at. It is not changed."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Connect the model you want to use, to see whether the concept fits "
                    "it, and if not, why.",
                ),
            ],
            outputs=[io.String.Output(display_name="text")],
        )

    @classmethod
    def execute(cls, concept: Any, model: Any = None) -> io.NodeOutput:
        fit = None if model is None else fit_to_model(concept, model)
        found = inspect_concept(concept, fit=fit)
        shown = told(*found.lines(), warnings=found.warnings(), table=found.table())
        return io.NodeOutput(found.text(layers=True), ui=shown)


class CompareModels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CompareModels",
            display_name="Compare Models",
            category=CATEGORY,
            description="Shows how much each kind of layer changed between two models: what a "
            "training of the whole UNet did, what a LoRA does, or in what two checkpoints differ.",
            search_aliases=["weight difference", "model diff", "which layers changed"],
            is_output_node=True,
            inputs=[
                io.Model.Input("before", tooltip="The model to compare with, its LoRAs included."),
                io.Model.Input("after", tooltip="The changed model, of the same family."),
            ],
            outputs=[io.Image.Output("plot")],
        )

    @classmethod
    def execute(cls, before: Any, after: Any) -> io.NodeOutput:
        found, picture = compare_models(before, after)
        return io.NodeOutput(picture, ui=told(*found.summary(), table=found.table()))


NODES = [InspectConcept, CompareModels]
