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
            description="What a training has learnt until now, so that a graph can be built while "
            "it goes on: of its last checkpoint, or of the best.",
            search_aliases=["checkpoint", "training progress", "training samples"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "job_id",
                    default="",
                    tooltip="The job id that Custom Diffusion Train gives. Empty: the newest job.",
                ),
                io.Combo.Input(
                    "checkpoint",
                    options=[_NEWEST, _BEST],
                    default=_NEWEST,
                    tooltip="Best: of those that were kept, the one before which the mean loss of "
                    "50 steps was lowest. That says less than looking at samples.",
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
