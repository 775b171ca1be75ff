"""The training jobs of this ComfyUI: their service, how they make room for prompts, and what the
browser hears of them.
"""

from __future__ import annotations

import atexit
import time
from functools import cache
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from server import PromptServer

from ....concept.concept import Concept
from ....concept.errors import JobError, TrainingError
from ....concept.file import read_concept
from ....pictures.opening import read_picture
from ....pictures.tensors import to_tensor
from ....trainer.jobs.folder import SAMPLE_EDGE, sample_picture
from ....trainer.jobs.job import Job
from ....trainer.jobs.service import TrainingService
from ....trainer.jobs.snapshot import JobState, Snapshot
from ....trainer.jobs.transitions import AT_WORK
from ..paths import jobs_folder
from .models import shared_copy
from .progress import NodeProgress
from .prompts import waiting_nodes

EVENT = "custom_diffusion.job"
NODE_EVENT = "custom_diffusion.node"
_POLL_S = 0.1
_TELL_EVERY_S = 0.25
_CLOSE_S = 30.0
_MOST_SAMPLES = 200
"""Of a job in one batch of pictures; each has three megabytes"""


@cache
def training_service() -> TrainingService:
    """The one service of this process. Ctrl-C lets the running job write a checkpoint."""
    service = TrainingService(jobs_folder(), _Teller(), shared_copy.drop)
    atexit.register(service.close, _CLOSE_S)
    return service


def tell_node(node_id: str, **shown: Any) -> None:
    """Tells the browser whose prompt it is what a node has to show before it is done: its `notes`,
    or the id of the `job` that it has begun, or found, and whether it `blocks` what needs the
    concept. Nobody, where a script sent the prompt.
    """
    server = getattr(PromptServer, "instance", None)
    if server and server.client_id:
        told = {"node": node_id, "prompt": server.last_prompt_id, **shown}
        server.send_sync(NODE_EVENT, told, server.client_id)


def device_memory() -> dict[str, Any]:
    """Of the device that trains; that of other programs counts as taken."""
    device = comfy.model_management.get_torch_device()
    return {
        "device": str(device),
        "free_bytes": int(comfy.model_management.get_free_memory(device)),
        "total_bytes": int(comfy.model_management.get_total_memory(device)),
    }


class _Teller:
    """Tells all browsers how a job is: at once when its state changes, else now and then."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[object, float]] = {}

    def __call__(self, job: Job) -> None:
        snapshot, now = job.snapshot(), time.monotonic()
        now_at = (snapshot.state, snapshot.doing, snapshot.waiting, snapshot.awaited)
        state = (*now_at, snapshot.preview_step)
        before, at_s = self._told.get(job.id, (None, 0.0))
        if state == before and now - at_s < _TELL_EVERY_S:
            return
        self._told[job.id] = (state, now)
        server = getattr(PromptServer, "instance", None)
        if server:
            server.send_sync(EVENT, snapshot.as_json())


def delete_job(job_id: str) -> None:
    """Removes a job, and tells the browsers. Raises JobError while it is at work, and where some of
    its files are left.
    """
    service, server = training_service(), getattr(PromptServer, "instance", None)
    before = service.deleted
    try:
        service.delete(job_id)
    finally:
        if server and service.deleted > before:
            server.send_sync(EVENT, {"id": job_id, "state": "deleted"})


def wait_for(job: Job, keep_on_interrupt: bool = False) -> Snapshot:
    """Shows the job's progress on the executing node until it ends, or the node is let go: then the
    snapshot is none of an end.

    Interrupting the prompt stops the job, saves what was learnt, and then interrupts; or leaves
    the job to go on in the background. Raises TrainingError when the job failed, and when it has
    been paused and cannot be resumed here: no other prompt would ever have its turn.
    """
    steps = job.snapshot().steps
    progress = NodeProgress()
    shown = 0
    with waiting_nodes.one_more(), job.waiters.one_more() as let_go:
        try:
            while not job.wait(_POLL_S) and not let_go.is_set():
                comfy.model_management.throw_exception_if_processing_interrupted()
                snapshot = job.snapshot()
                if snapshot.state is JobState.PAUSED and not _can_be_resumed(job):
                    raise TrainingError(
                        f"The training job {job.id} is paused at step {snapshot.step} of {steps}, "
                        f"and its models are not loaded any more. Queue the graph again: it goes "
                        f"on from there."
                    )
                preview = None
                if snapshot.preview_hwc is not None and snapshot.preview_step != shown:
                    shown = snapshot.preview_step
                    preview = ("JPEG", sample_picture(snapshot.preview_hwc), SAMPLE_EDGE)
                progress.show(snapshot.progress, preview)
        except comfy.model_management.InterruptProcessingException:
            if not keep_on_interrupt:
                training_service().stop(job.id)
                while job.snapshot().state in AT_WORK:  # its turn may be long to wait for
                    job.wait(_POLL_S)
            raise
    snapshot = job.snapshot()
    if snapshot.state is JobState.FAILED:
        raise TrainingError(snapshot.error)
    return snapshot


def _can_be_resumed(job: Job) -> bool:
    return job.is_loaded and job.folder.path.is_dir()


def jobs_to_go_on_with(wait: bool) -> str:
    """Differs when a training node has something to do again with the same inputs: a job has been
    paused, stopped or deleted, has failed, or has finished while nobody waited for it, or the node
    that waited was let go.
    """
    left = {JobState.PAUSED, JobState.STOPPED, JobState.FAILED}
    left |= set() if wait else {JobState.FINISHED}
    service = training_service()
    states = [(job.id, job.snapshot().state) for job in service.jobs()]
    told = [f"{job_id} {state.value}" for job_id, state in states if state in left]
    return " ".join([f"{service.deleted} {service.released}", *told])


def chosen_job(job_id: str) -> Job:
    """With that id, or the newest. Raises JobError when there is none."""
    service = training_service()
    jobs = service.jobs()
    if not job_id and not jobs:
        raise JobError("There is no training job yet. Queue a graph with CustomDiffusionTrain.")
    return service.job(job_id) if job_id else jobs[-1]


def nothing_learnt(job: Job) -> JobError:
    """For whoever asks what a job has learnt that has written no concept yet."""
    snapshot = job.snapshot()
    return JobError(
        f"The training job {job.id} is {snapshot.state.value} at step {snapshot.step} and has "
        f"written no checkpoint with a concept yet. Wait for one, or choose another job."
    )


def job_results(job_id: str, best: bool) -> tuple[Concept, dict[str, list[float]], Any, str]:
    """Of a job, or of the newest: what it has learnt until now, its losses, its newest
    samples (n, h, w, 3), and how it is.

    Raises JobError when there is no such job, or it has written no checkpoint yet.
    """
    job = chosen_job(job_id)
    snapshot = job.snapshot()
    file = job.folder.best_concept() if best else snapshot.concept_file
    file = file if file and file.is_file() else job.folder.newest_concept()
    if file is None:
        raise nothing_learnt(job)
    paths = list(job.folder.samples().values())
    samples = [_tensor(path) for path in paths[-_MOST_SAMPLES:]]
    pictures = torch.stack(samples) if samples else torch.zeros(1, 64, 64, 3)
    told = f"{snapshot.state.value}, step {snapshot.step} of {snapshot.steps}"
    if len(paths) > len(samples):
        told += f"; the newest {len(samples)} of {len(paths)} samples"
    return read_concept(file), {"loss": job.losses()}, pictures, told


def _tensor(path: Path) -> torch.Tensor:
    """(h, w, 3), of one size whatever somebody has put there."""
    picture = read_picture(path).convert("RGB")
    if picture.size != (SAMPLE_EDGE, SAMPLE_EDGE):
        picture = picture.resize((SAMPLE_EDGE, SAMPLE_EDGE))
    return to_tensor(picture)
