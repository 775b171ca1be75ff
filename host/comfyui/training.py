"""Starting a training from a node, and waiting for it with progress and a preview on the node."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image

from ...concept.concept import Concept
from ...concept.errors import TrainingError
from ...concept.file import read_concept, write_new, write_new_concept
from ...concept.fit import check_text_width
from ...trainer.config import TrainConfig
from ...trainer.data import TrainingConcept
from ...trainer.jobs import Job, JobState, Snapshot, TrainingService
from ...trainer.loop import train
from ...trainer.methods import METHODS
from ...trainer.network_file import fold_in, write_network
from ...trainer.prepare import prepare
from ...trainer.start import check_start
from .models import ComfyDenoiser, ComfyLatentEncoder, text_encoder, training_dtype
from .paths import concept_folder, jobs_folder, network_folder

log = logging.getLogger("custom_diffusion")
_POLL_S = 0.1
_PREVIEW_PIXELS = 512


@cache
def training_service() -> TrainingService:
    """The one service of this process."""
    return TrainingService(jobs_folder())


def start_training(
    name: str,
    model: Any,
    clip: Any,
    vae: Any,
    concepts: Sequence[TrainingConcept],
    config: TrainConfig,
    start: Concept | None = None,
) -> Job:
    """Encodes the pictures, copies the models and queues the job. Runs on the prompt thread.

    Everything that needs ComfyUI's own models happens here; the job touches only its copies.
    """
    device = comfy.model_management.get_torch_device()
    scale_factor = model.model.latent_format.scale_factor
    denoiser = ComfyDenoiser(model, training_dtype(device))
    encoder = text_encoder(clip)
    check_text_width(encoder.context_width, denoiser.family)
    if start:  # before the time that encoding takes
        check_start(start, denoiser, config)
    progress = comfy.utils.ProgressBar(1)
    latent_encoder = ComfyLatentEncoder(vae, scale_factor)
    banks = [
        prepare(
            concept,
            config,
            latent_encoder,
            encoder,
            lambda done, total, before=index: progress.update_absolute(
                before * total + done, len(concepts) * total
            ),
        )
        for index, concept in enumerate(concepts)
    ]

    def run(should_stop: Any, on_event: Any) -> Concept:
        try:
            denoiser.to(device)
            encoder.to(device)
            return train(
                config,
                concepts,
                banks,
                denoiser,
                encoder,
                start=start,
                should_stop=should_stop,
                on_event=on_event,
            )
        except torch.OutOfMemoryError as error:
            raise TrainingError(_out_of_memory(config, device)) from error

    def save(result: Concept) -> Path:
        if METHODS[config.method].whole_network:
            result = fold_in(denoiser, result)
            network = write_new(
                network_folder(), name, lambda path: write_network(denoiser.network, path)
            )
            log.info("saved the whole UNet: %s", network)
        return write_new_concept(result, concept_folder(), name)

    settings = {
        "concepts": [{"token": c.token, "class_noun": c.class_noun} for c in concepts],
        "start": start.describe() if start else None,
        "config": config.as_json(),
    }
    return training_service().submit(name, config.steps, settings, run, save)


def wait_for(job: Job) -> Snapshot:
    """Shows the job's progress on the executing node until it ends.

    Interrupting the prompt stops the job, saves what was learnt, and then interrupts. Raises
    TrainingError when the job failed.
    """
    steps = job.snapshot().steps
    progress = comfy.utils.ProgressBar(steps)
    shown = 0
    try:
        while not job.wait(_POLL_S):
            comfy.model_management.throw_exception_if_processing_interrupted()
            snapshot = job.snapshot()
            preview = None
            if snapshot.preview_hwc is not None and snapshot.preview_step != shown:
                shown = snapshot.preview_step
                preview = ("JPEG", _picture(snapshot.preview_hwc), _PREVIEW_PIXELS)
            progress.update_absolute(snapshot.step, steps, preview)
    except comfy.model_management.InterruptProcessingException:
        job.stop()
        job.wait()
        snapshot = job.snapshot()
        log.info("stopped at step %d of %d, saved: %s", snapshot.step, steps, snapshot.concept_file)
        raise
    snapshot = job.snapshot()
    if snapshot.state is JobState.FAILED:
        raise TrainingError(snapshot.error)
    return snapshot


def training_outputs(job: Job, wait: bool) -> tuple[Any, Any, str]:
    """(concept, loss map, job id); in the background the first two block what depends on them."""
    if not wait:
        return ExecutionBlocker(None), ExecutionBlocker(None), job.id
    snapshot = wait_for(job)
    if snapshot.concept_file is None:
        raise TrainingError("The job was stopped before its first step; nothing was learnt.")
    return read_concept(snapshot.concept_file), {"loss": list(snapshot.losses)}, job.id


def _out_of_memory(config: TrainConfig, device: torch.device) -> str:
    free = comfy.model_management.get_free_memory(device)
    return (
        f"The memory of {device} was not enough for pictures of {config.resolution} px, one at a "
        f"time and with gradient checkpointing; {free / 1e9:.1f} GB are free. Unload other models "
        f"or lower resolution, and train again."
    )


def _picture(image_hwc: torch.Tensor) -> Image.Image:
    """A preview, enlarged so that its latents can be seen."""
    picture = Image.fromarray((image_hwc * 255).to(torch.uint8).numpy())
    return picture.resize((_PREVIEW_PIXELS, _PREVIEW_PIXELS), Image.Resampling.BICUBIC)
