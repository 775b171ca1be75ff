"""Looking at a training while it goes on, and using what it has learnt by then."""

import time
from typing import Any

from comfy_api.latest import io, ui

from ..host.comfyui.drawing import Sampling
from ..host.comfyui.jobs.comparison import compare_steps
from ..host.comfyui.jobs.service import job_results
from .sampling_inputs import sampling_inputs
from .types import CATEGORY, Concept, told

_NEWEST, _BEST = "newest", "best"


class TrainingJob(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrainingJob",
            display_name="Training Job",
            category=CATEGORY,
            description="What a training has learnt so far, from its newest or best checkpoint. "
            "Use it to build your graph before the training is done.",
            search_aliases=["checkpoint", "training progress", "training samples"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "job_id",
                    default="",
                    tooltip="The job id from Custom Diffusion Train. Leave it empty for the "
                    "newest job.",
                ),
                io.Combo.Input(
                    "checkpoint",
                    options=[_NEWEST, _BEST],
                    default=_NEWEST,
                    tooltip="best is the kept version with the lowest validation loss, or "
                    "without validation_pictures the lowest mean loss in the 50 steps before it. "
                    "Compare Steps tells you more: it draws them.",
                ),
            ],
            outputs=[
                Concept.Output(display_name="concept"),
                io.LossMap.Output(display_name="loss map"),
                io.Image.Output(display_name="samples"),
                io.String.Output(display_name="state"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> float:
        return time.time()  # a job changes without its inputs

    @classmethod
    def execute(cls, job_id: Any, checkpoint: Any) -> io.NodeOutput:
        results = job_results(job_id.strip(), best=checkpoint == _BEST)
        return io.NodeOutput(*results, ui=told(results[-1]))


class CompareSteps(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CompareSteps",
            display_name="Compare Steps",
            category=CATEGORY,
            description="Draws the kept steps of a training beside each other, with several "
            "strengths and seeds, so that you can choose the best one.",
            search_aliases=["xy plot", "checkpoint comparison", "which step", "epochs"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that the training teaches."),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.String.Input(
                    "job_id",
                    default="",
                    tooltip="The job id from Custom Diffusion Train. Leave it empty for the "
                    "newest job.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="What to draw, with the trigger word: a <new1> cat on a beach. Leave "
                    "it empty for the plain prompt of the concept.",
                ),
                io.String.Input(
                    "negative", default="", tooltip="What the pictures should not show."
                ),
                io.String.Input(
                    "steps",
                    default="",
                    tooltip="Which steps of the training to compare: 100, 150, 200. Leave it empty "
                    "for all that are kept; keep_best of the training says how many that are.",
                ),
                io.String.Input(
                    "strengths",
                    default="0.6, 0.8, 1",
                    tooltip="Strengths to draw each step with. 1 is as trained.",
                ),
                io.String.Input(
                    "seeds",
                    default="0, 1",
                    tooltip="Seeds to draw each step with. Use several: one picture says little.",
                ),
                *sampling_inputs("Use the resolution of the training.", "sampling_steps"),
            ],
            outputs=[
                io.Image.Output(display_name="sheet"),
                io.Image.Output(display_name="pictures"),
                io.String.Output(display_name="text"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> float:
        return time.time()  # a job changes without its inputs

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        job_id: Any,
        sampling_steps: Any,
        cfg: Any,
        sampler_name: Any,
        scheduler: Any,
        resolution: Any,
        **inputs: Any,
    ) -> io.NodeOutput:
        sampling = Sampling(sampling_steps, cfg, sampler_name, scheduler, resolution)
        sheet, pictures, text = compare_steps(
            model, clip, vae, job_id=job_id.strip(), sampling=sampling, **inputs
        )
        shown = told(text, **ui.PreviewImage(sheet, cls=cls).as_dict())
        return io.NodeOutput(sheet, pictures, text, ui=shown)


NODES = [TrainingJob, CompareSteps]
