"""Teaching a concept: what to teach, and the training itself."""

from typing import Any

from comfy_api.latest import io

from ..host.comfyui.jobs.service import jobs_to_go_on_with, tell_node
from ..host.comfyui.jobs.training import Origin, start_training, training_outputs
from ..host.comfyui.settings import follow_comfy_model
from ..trainer.automatic import AUTOMATIC
from ..trainer.methods import METHODS
from ..trainer.request import TrainingRequest
from .training_inputs import automatic_inputs, job_input, method_inputs, setting_inputs
from .types import (
    CATEGORY,
    Concept,
    TrainingConcept,
    TrainingOptions,
    notes,
    told,
    without_leftovers,
)

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
                    options=[
                        io.DynamicCombo.Option(AUTOMATIC, automatic_inputs()),
                        *(io.DynamicCombo.Option(name, method_inputs(name)) for name in METHODS),
                    ],
                    tooltip="What is trained. Keep automatic: it takes custom diffusion for SD 1.x "
                    "and 2.x, low-rank for SDXL, and the node says so. "
                    + ". ".join(f"{name}: {method.description}" for name, method in METHODS.items())
                    + ".",
                ),
                *setting_inputs("run"),
                io.Boolean.Input(
                    "wait",
                    default=True,
                    label_on="until trained",
                    label_off="in background",
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
                job_input("checkpoint_every_steps"),
                io.Boolean.Input(
                    "share_device",
                    default=False,
                    advanced=True,
                    label_on="beside prompts",
                    label_off="prompts first",
                    tooltip="Off: the training pauses between steps while a prompt runs. On: both "
                    "run at once, and both are slower.",
                ),
                io.Boolean.Input(
                    "keep_on_interrupt",
                    default=False,
                    advanced=True,
                    label_on="trains on",
                    label_off="stops, saves",
                    tooltip="What happens when you cancel a prompt that waits for this training. "
                    "Turn it on to let the training continue in the background.",
                ),
                job_input("keep_best"),
                *setting_inputs("added"),
                TrainingOptions.Input(
                    "options",
                    optional=True,
                    tooltip="From Custom Diffusion Options: choices that few trainings need. Leave "
                    "it unconnected otherwise.",
                ),
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
        options: Any = None,
        **settings: Any,
    ) -> io.NodeOutput:
        node_id = str(cls.hidden.unique_id)
        taught = list(concepts.values())
        chosen = {**method, **settings, **(options or {})}
        config, found = follow_comfy_model(model, chosen, len(taught), start)
        lines = [found] if found else []
        tell_node(node_id, notes=notes(*lines))  # before the time that encoding takes
        job = start_training(
            name,
            TrainingRequest(config, taught, start),
            Origin(model, clip, vae, cls.hidden.prompt or {}, node_id),
            checkpoint_every_steps=checkpoint_every_steps,
            share_device=share_device,
            keep_best=keep_best,
        )
        outputs = training_outputs(job, wait, keep_on_interrupt, node_id)
        return io.NodeOutput(*outputs, ui=told(*lines))


class CustomDiffusionOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CustomDiffusionOptions",
            display_name="Custom Diffusion Options",
            category=CATEGORY,
            description="Choices for Custom Diffusion Train that few trainings need. As they are, "
            "they change nothing.",
            search_aliases=["training options", "optimizer", "learning rate schedule", "min snr"],
            inputs=setting_inputs("options"),
            outputs=[TrainingOptions.Output(display_name="options")],
        )

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(settings)


NODES = [CustomDiffusionTrain, CustomDiffusionOptions]
