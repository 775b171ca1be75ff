"""Teaching a concept: what to teach, and the training itself."""

from typing import Any

from comfy_api.latest import io

from ..host.comfyui.jobs.service import jobs_to_go_on_with, tell_node
from ..host.comfyui.jobs.training import start_training, training_outputs
from ..trainer.config import TrainConfig
from ..trainer.methods import METHODS
from .training_inputs import method_inputs, setting_inputs
from .types import CATEGORY, Concept, TrainingConcept, without_leftovers

CHECKPOINT_EVERY_STEPS = 50
MOST_CONCEPTS = 8


class CustomDiffusionTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CustomDiffusionTrain",
            display_name="Custom Diffusion Train",
            category=CATEGORY,
            description="Teaches the model concepts on a thread of its own, and saves them in "
            "models/custom_diffusion. Interrupting saves what was learnt so far.",
            search_aliases=["train", "finetune", "dreambooth", "textual inversion"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="SD 1.x, SD 2.x or SDXL. It is copied, never changed."
                ),
                io.Clip.Input("clip", tooltip="The text encoder of the same checkpoint."),
                io.Vae.Input("vae"),
                io.Autogrow.Input(
                    "concepts",
                    template=io.Autogrow.TemplatePrefix(
                        TrainingConcept.Input("concept"), prefix="concept", min=1, max=MOST_CONCEPTS
                    ),
                ),
                io.String.Input(
                    "name", default="my-concept", tooltip="Name of the concept's file."
                ),
                io.DynamicCombo.Input(
                    "method",
                    options=[io.DynamicCombo.Option(name, method_inputs(name)) for name in METHODS],
                    tooltip=". ".join(
                        f"{name}: {method.description}" for name, method in METHODS.items()
                    ),
                ),
                *setting_inputs("run"),
                io.Boolean.Input(
                    "wait",
                    default=True,
                    label_on="until trained",
                    label_off="no, in the background",
                    tooltip="Wait, and hand the concept on; or return at once with the job's id.",
                ),
                *setting_inputs("views"),
                Concept.Input(
                    "start",
                    optional=True,
                    tooltip="A concept of this model to go on from: with the same modifier token "
                    "its training continues, with another one more is learnt on top of it.",
                ),
                *setting_inputs("advanced"),
                io.Int.Input(
                    "checkpoint_every_steps",
                    default=CHECKPOINT_EVERY_STEPS,
                    min=1,
                    max=10_000,
                    advanced=True,
                    tooltip="After so many steps the training is written to disk. A crash costs no "
                    "more than the steps since: queue the same graph again, and it goes on.",
                ),
                io.Boolean.Input(
                    "share_device",
                    default=False,
                    advanced=True,
                    label_on="trains while prompts run",
                    label_off="prompts go first",
                    tooltip="Prompts go first: between two steps the training waits until they are "
                    "done. Or both at once, both slower.",
                ),
                io.Boolean.Input(
                    "keep_on_interrupt",
                    default=False,
                    advanced=True,
                    label_on="goes on in the background",
                    label_off="stops and saves",
                    tooltip="What the training does when you interrupt the prompt that waits.",
                ),
                io.Int.Input(
                    "keep_best",
                    default=1,
                    min=1,
                    max=100,
                    advanced=True,
                    tooltip="So many concepts of the run are kept in its folder beside the newest: "
                    "those before which the losses were lowest.",
                ),
                *setting_inputs("added"),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            outputs=[
                Concept.Output(display_name="concept"),
                io.LossMap.Output(display_name="loss map"),
                io.String.Output(display_name="job id"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> str:
        return jobs_to_go_on_with(bool(inputs.get("wait")))

    @classmethod
    @without_leftovers
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        concepts: Any,
        name: Any,
        method: Any,
        wait: Any,
        checkpoint_every_steps: Any,
        share_device: Any,
        keep_on_interrupt: Any,
        keep_best: Any,
        start: Any = None,
        **settings: Any,
    ) -> io.NodeOutput:
        node_id = str(cls.hidden.unique_id)
        job = start_training(
            name,
            model,
            clip,
            vae,
            list(concepts.values()),
            TrainConfig(**method, **settings),
            start,
            checkpoint_every_steps=checkpoint_every_steps,
            share_device=share_device,
            keep_best=keep_best,
            prompt=cls.hidden.prompt or {},
            node_id=node_id,
        )
        tell_node(node_id, job)
        return io.NodeOutput(*training_outputs(job, wait, keep_on_interrupt))


NODES = [CustomDiffusionTrain]
