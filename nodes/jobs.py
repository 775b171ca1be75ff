"""Looking at a training while it goes on, and using what it has learnt by then."""

import time
from typing import Any

from comfy_api.latest import io

from ..host.comfyui.jobs.service import job_results
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
                    tooltip="best is the kept version with the lowest mean loss in the 50 steps "
                    "before it. Looking at samples tells you more than the loss does.",
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


NODES = [TrainingJob]
