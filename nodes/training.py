"""Teaching a concept: what to teach, and the training itself."""

from typing import Any, get_args

from comfy_api.latest import io

from ..host.comfyui.jobs.service import jobs_to_go_on_with, tell_node
from ..host.comfyui.jobs.training import start_training, training_outputs
from ..trainer.config import GradientCut, OptimizerName, TrainConfig
from ..trainer.methods import METHODS
from .training_inputs import DEFAULTS, method_inputs, resolution_input, seed_input, view_inputs
from .types import CATEGORY, Concept, TrainingConcept

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
                io.Int.Input(
                    "batch_size",
                    default=DEFAULTS.batch_size,
                    min=1,
                    max=256,
                    tooltip="Pictures a step; half of them regularization, when there are any.",
                ),
                resolution_input(),
                seed_input(),
                io.Boolean.Input(
                    "wait",
                    default=True,
                    label_on="until trained",
                    label_off="no, in the background",
                    tooltip="Wait, and hand the concept on; or return at once with the job's id.",
                ),
                *view_inputs(),
                Concept.Input(
                    "start",
                    optional=True,
                    tooltip="A concept of this model to go on from: with the same modifier token "
                    "its training continues, with another one more is learnt on top of it.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=DEFAULTS.prior_weight,
                    min=0,
                    max=10,
                    step=0.1,
                    advanced=True,
                    tooltip="Weight of the regularization pictures.",
                ),
                io.Combo.Input(
                    "gradient_cut",
                    options=list(get_args(GradientCut)),
                    default=DEFAULTS.gradient_cut,
                    advanced=True,
                    tooltip="Positions of the prompt whose keys and values pass no gradient: the "
                    "start token as in the paper's code, and the padding after the last word, "
                    "through which a merge would lose what was learnt.",
                ),
                io.Int.Input(
                    "micro_batch_size",
                    default=DEFAULTS.micro_batch_size,
                    min=0,
                    max=256,
                    advanced=True,
                    tooltip="Pictures computed at once, a part of the batch; 0 is all of it. It "
                    "becomes less by itself when memory runs out.",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=DEFAULTS.gradient_checkpointing,
                    advanced=True,
                    tooltip="Needs less memory and more time. It is turned on by itself when one "
                    "picture at once is still too much.",
                ),
                io.Int.Input(
                    "preview_every_steps",
                    default=DEFAULTS.preview_every_steps,
                    min=0,
                    max=10_000,
                    advanced=True,
                    tooltip="A picture of '<new1> cat' is drawn this often; 0 draws none.",
                ),
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
                # Optional, and last: graphs that were saved before there was a choice still run.
                io.Combo.Input(
                    "optimizer",
                    options=list(get_args(OptimizerName)),
                    default=DEFAULTS.optimizer,
                    optional=True,
                    advanced=True,
                    tooltip="8-bit: the optimiser's state in a quarter of the memory. It needs "
                    "the Python package bitsandbytes.",
                ),
                io.Boolean.Input(
                    "text_encoder_on_cpu",
                    default=DEFAULTS.text_encoder_on_cpu,
                    optional=True,
                    advanced=True,
                    tooltip="Leaves the text encoders in main memory: less GPU memory, slower "
                    "steps. For SDXL on small GPUs.",
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
