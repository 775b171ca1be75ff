"""Concepts on a loaded model."""

from typing import Any

from comfy_api.latest import io

from ..composition.timing import Span
from ..host.comfyui.apply import apply_concept, hook_concept, text_remarks
from .types import CATEGORY, Concept, span_inputs, told


class ApplyKVDelta(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ApplyKVDelta",
            display_name="Apply Concept (KV Delta)",
            category=CATEGORY,
            description="Adds a concept to a model, like a LoRA loader. Its trigger word, such as "
            "<new1>, then works in every prompt that is encoded with this CLIP.",
            search_aliases=["apply concept", "custom diffusion", "load lora"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The checkpoint the concept was trained on, or a close relative. It is "
                    "not changed.",
                ),
                io.Clip.Input(
                    "clip",
                    tooltip="The CLIP of the same checkpoint. Encode your prompts with the CLIP "
                    "that comes out of this node.",
                ),
                Concept.Input(
                    "concept",
                    tooltip="The concept to add, from Load Concept, Custom Diffusion Train or "
                    "Concept Merge.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="How much of the concept. 1 is as trained, 0 is exactly the base "
                    "model; lower it if the concept takes over the picture.",
                ),
                *span_inputs(),
            ],
            outputs=[io.Model.Output(), io.Clip.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        concept: Any,
        strength: float,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
    ) -> io.NodeOutput:
        span = Span(start_percent, end_percent)
        applied = apply_concept(model, clip, concept, strength, span)
        return io.NodeOutput(*applied, ui=told(warnings=text_remarks(clip, [concept])))


class CreateHookConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CreateHookConcept",
            display_name="Create Hook Concept",
            category=CATEGORY,
            description="A concept as hooks: ComfyUI's own nodes set them on a prompt, with a "
            "mask, a range of steps or a schedule of strengths.",
            search_aliases=["hook lora", "schedule concept", "mask concept"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The checkpoint that you sample with. It is only looked at: connect it "
                    "to the sampler itself.",
                ),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                Concept.Input("concept", tooltip="From Load Concept or Custom Diffusion Train."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="How much of the concept where the hooks are set. 1 is as trained.",
                ),
            ],
            outputs=[io.Clip.Output(), io.Hooks.Output()],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, concept: Any, strength: float) -> io.NodeOutput:
        hooked = hook_concept(model, clip, concept, strength)
        return io.NodeOutput(*hooked, ui=told(warnings=text_remarks(clip, [concept])))


NODES = [ApplyKVDelta, CreateHookConcept]
