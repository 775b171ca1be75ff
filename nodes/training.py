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
            description="Teaches the model one or more concepts and saves them in "
            "models/custom_diffusion. Interrupting saves what was learnt so far.",
            search_aliases=["train", "finetune", "dreambooth", "textual inversion"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to teach: SD 1.x, SD 2.x or SDXL. It is copied, never "
                    "changed.",
                ),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Autogrow.Input(
                    "concepts",
                    template=io.Autogrow.TemplatePrefix(
                        TrainingConcept.Input(
                            "concept",
                            tooltip="A Custom Diffusion Concept. Connect several to teach them "
                            "together in one file.",
                        ),
                        prefix="concept",
                        min=1,
                        max=MOST_CONCEPTS,
                    ),
                    tooltip="What to teach: one Custom Diffusion Concept, or up to eight that "
                    "share one file.",
                ),
                io.String.Input(
                    "name",
                    default="my-concept",
                    tooltip="Name of the concept's file. A number is added if the name is taken.",
                ),
                io.DynamicCombo.Input(
                    "method",
                    options=[io.DynamicCombo.Option(name, method_inputs(name)) for name in METHODS],
                    tooltip="What is trained. Use custom diffusion for SD 1.x and 2.x, low-rank "
                    "for SDXL. "
                    + ". ".join(f"{name}: {method.description}" for name, method in METHODS.items())
                    + ".",
                ),
                *setting_inputs("run"),
                io.Boolean.Input(
                    "wait",
                    default=True,
                    label_on="until trained",
                    label_off="no, in the background",
                    tooltip="On: the node waits for the training and passes the concept on. Off: "
                    "it returns at once, and the training runs in the background.",
                ),
                *setting_inputs("views"),
                Concept.Input(
                    "start",
                    optional=True,
                    tooltip="A concept of this model to extend. With the same trigger word it is "
                    "trained further, with another one a new concept is added to it.",
                ),
                *setting_inputs("advanced"),
                io.Int.Input(
                    "checkpoint_every_steps",
                    default=CHECKPOINT_EVERY_STEPS,
                    min=1,
                    max=10_000,
                    advanced=True,
                    tooltip="How often progress is saved, in steps. After a crash you lose at "
                    "most this many: queue the same graph again to resume.",
                ),
                io.Boolean.Input(
                    "share_device",
                    default=False,
                    advanced=True,
                    label_on="trains while prompts run",
                    label_off="prompts go first",
                    tooltip="Off: the training pauses between steps while a prompt runs. On: both "
                    "run at once, and both are slower.",
                ),
                io.Boolean.Input(
                    "keep_on_interrupt",
                    default=False,
                    advanced=True,
                    label_on="continues in the background",
                    label_off="stops and saves",
                    tooltip="What happens when you cancel a prompt that waits for this training. "
                    "Turn it on to let the training continue in the background.",
                ),
                io.Int.Input(
                    "keep_best",
                    default=1,
                    min=1,
                    max=100,
                    advanced=True,
                    tooltip="How many earlier versions to keep besides the newest: the ones with "
                    "the lowest validation loss, or without validation_pictures the lowest recent "
                    "loss. Raise it to compare more steps.",
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
