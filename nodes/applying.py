"""Concepts on a loaded model."""

from typing import Any

from comfy_api.latest import io

from ..host.comfyui.apply import apply_concept, text_remarks
from .types import CATEGORY, Concept, told


class ApplyKVDelta(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ApplyKVDelta",
            display_name="Apply Concept (KV Delta)",
            category=CATEGORY,
            description="Adds a concept to a model. Its modifier token, <new1> for example, then "
            "works in every prompt that is encoded with this CLIP.",
            search_aliases=["apply concept", "custom diffusion", "load lora"],
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                Concept.Input("concept"),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="0 is exactly the base model.",
                ),
            ],
            outputs=[io.Model.Output(), io.Clip.Output()],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, concept: Any, strength: float) -> io.NodeOutput:
        applied = apply_concept(model, clip, concept, strength)
        return io.NodeOutput(*applied, ui=told(warnings=text_remarks(clip, [concept])))


NODES = [ApplyKVDelta]
