"""Starting a training from a node."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_execution.graph_utils import ExecutionBlocker

from ....concept.concept import Concept
from ....concept.errors import TrainingError
from ....concept.file import read_concept, write_new_concept
from ....concept.naming import write_new
from ....concept.text import TextEncoder
from ....merge.projection import project_on_own_words
from ....trainer.checkpoint import Checkpoint
from ....trainer.config import TrainConfig
from ....trainer.data.latents import LatentBank
from ....trainer.data.training_concept import TrainingConcept
from ....trainer.events import Event
from ....trainer.jobs.fingerprint import training_fingerprint
from ....trainer.jobs.job import Job
from ....trainer.jobs.snapshot import JobState
from ....trainer.jobs.work import Work, never
from ....trainer.learning.network_file import fold_in, write_network
from ....trainer.loop import train
from ....trainer.methods import METHODS
from ....trainer.prepare import prepare
from ....trainer.start import check_start
from ..models.parts import check_models
from ..models.text import text_encoder
from ..models.unet import ComfyDenoiser, ComfyLatentEncoder
from ..paths import cache_folder, concept_folder, network_folder
from .models import Base, Models, copy_unet, shared_copy, unet_weights
from .prompts import prompt_is_running
from .service import training_service, wait_for

log = logging.getLogger("custom_diffusion")


def start_training(
    name: str,
    model: Any,
    clip: Any,
    vae: Any,
    concepts: Sequence[TrainingConcept],
    config: TrainConfig,
    start: Concept | None = None,
    *,
    checkpoint_every_steps: int,
    share_device: bool,
    keep_best: int,
    prompt: Mapping[str, Any],
    node_id: str,
) -> Job:
    """Encodes the pictures and queues the job. Runs on the prompt thread.

    Everything that needs ComfyUI's own models happens here; the job touches only its copies.
    A job that had the same to do is not begun anew: it goes on, or is handed out when it has
    finished. What node `node_id` needs of the prompt is kept, so that the job can be gone on with
    in another process.
    """
    service = training_service()
    check_models(model, clip, vae)
    encoder = text_encoder(clip)
    networks = (unet_weights(model, config), vae.first_stage_model)
    fingerprint = f"{name} {training_fingerprint(config, concepts, encoder, networks, start)}"
    same = service.join(fingerprint, config.steps, config.ends_early)
    if same is None or not same.snapshot().ended:
        models = Models(copy_unet(model, config), encoder)
        base = Base(model, clip, config, models)  # a job that waits already may need it
    if same:
        log.info("the training job %s had the same to do: it is not begun again", same.id)
        return same
    if start:  # before the time that encoding takes
        check_start(start, models.denoiser, config)
    latent_encoder = ComfyLatentEncoder(vae, model.model.latent_format.scale_factor)
    banks = _encoded(concepts, config, latent_encoder, models.encoder, start)
    _make_room(models.denoiser)
    training = _Training(name, concepts, banks, config, start, checkpoint_every_steps, base)
    description = {
        "concepts": [{"token": c.token, "class_noun": c.class_noun} for c in concepts],
        "start": start.describe() if start else None,
        "config": config.as_json(),
        "graph": graph_until(prompt, node_id),
        "node": node_id,
        "keep_best": keep_best,
    }
    work = Work(
        training.train,
        training.save,
        never if share_device else prompt_is_running,
        training.turn,
        lambda: base.is_loaded or shared_copy.has(base),
    )
    return service.submit(
        name,
        config.steps,
        description,
        work,
        fingerprint,
        config.ends_early,
        on_next=lambda: shared_copy.keep(base, models),
    )


class _Training:
    """A run, from the turn of its job on. Until then, and after it, it holds no models."""

    def __init__(
        self,
        name: str,
        concepts: Sequence[TrainingConcept],
        banks: Sequence[LatentBank],
        config: TrainConfig,
        start: Concept | None,
        checkpoint_every_steps: int,
        base: Base,
    ) -> None:
        self._name, self._config, self._base = name, config, base
        self._method = METHODS[config.method]
        self._models: Models | None = None
        self._train = partial(
            train,
            config,
            concepts,
            banks,
            start=start,
            checkpoint_every_steps=checkpoint_every_steps,
        )

    @contextmanager
    def turn(self, should_leave: Callable[[], bool]) -> Iterator[bool]:
        device = comfy.model_management.get_torch_device()
        self._models = models = shared_copy.at_turn_of(self._base, should_leave)
        if models is None:
            yield False
            return
        try:
            models.denoiser.to(device)
            if not self._config.text_encoder_on_cpu:
                models.encoder.to(device, models.denoiser.dtype)
            yield True
        finally:  # what waits, or has ended, leaves the device to others
            self._models = None
            if not self._method.leaves_network_frozen:
                shared_copy.drop()
            models.denoiser.to(torch.device("cpu"))
            models.encoder.to(torch.device("cpu"))
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def train(
        self,
        checkpoint: Checkpoint | None,
        should_stop: Callable[[], bool],
        on_event: Callable[[Event], None],
    ) -> Concept:
        assert self._models is not None, "its turn has not come"
        denoiser = self._models.denoiser
        try:
            return self._train(
                denoiser,
                self._models.encoder,
                checkpoint=checkpoint,
                should_stop=should_stop,
                on_event=on_event,
            )
        except torch.OutOfMemoryError as error:
            raise TrainingError(_out_of_memory(self._config, denoiser.device, error)) from error

    def save(self, result: Concept) -> Path:
        assert self._models is not None, "its turn is over"
        if self._method.whole_network:
            denoiser = self._models.denoiser
            result = fold_in(denoiser, result)
            network = write_new(
                network_folder(), self._name, lambda path: write_network(denoiser.network, path)
            )
            log.info("saved the whole UNet: %s", network)
        if result.scope == "own words":
            # The job's folder keeps the whole of it; this is small and acts right in any loader.
            result, _ = project_on_own_words(
                result, self._models.encoder, cache_folder=cache_folder()
            )
        return write_new_concept(result, concept_folder(), self._name)


def _make_room(denoiser: ComfyDenoiser) -> None:
    """Lets ComfyUI unload what it holds on the device, as it would for a model of its own: enough
    for what of the network has to move there, and for what ComfyUI sets aside to draw.
    """
    device = comfy.model_management.get_torch_device()
    tensors = denoiser.network.state_dict().values()
    needed = sum(tensor.nbytes for tensor in tensors if tensor.device.type != device.type)
    needed += comfy.model_management.minimum_inference_memory()
    comfy.model_management.free_memory(needed, device)


def _encoded(
    concepts: Sequence[TrainingConcept],
    config: TrainConfig,
    latent_encoder: ComfyLatentEncoder,
    encoder: TextEncoder,
    start: Concept | None,
) -> list[LatentBank]:
    """With progress on the node."""
    progress = comfy.utils.ProgressBar(1)

    def show(before: int, done: int, total: int) -> None:
        progress.update_absolute(before * total + done, len(concepts) * total)

    return [
        prepare(concept, config, latent_encoder, encoder, partial(show, index), start=start)
        for index, concept in enumerate(concepts)
    ]


def graph_until(prompt: Mapping[str, Any], node_id: str) -> dict[str, Any]:
    """The part of a prompt's graph that a node needs; nothing for a node that is not in it.

    As it was sent: ComfyUI adds what it has found out about the nodes, which would be taken for the
    truth when the graph is queued again.
    """
    needed: dict[str, Any] = {}
    waiting = [node_id] if node_id in prompt else []
    while waiting:
        key = waiting.pop()
        needed[key] = {name: prompt[key][name] for name in ("class_type", "inputs")}
        links = [v for v in prompt[key]["inputs"].values() if isinstance(v, list) and len(v) == 2]
        waiting += [link[0] for link in links if link[0] in prompt and link[0] not in needed]
    return needed


def training_outputs(job: Job, wait: bool, keep_on_interrupt: bool) -> tuple[Any, Any, str]:
    """(concept, loss map, job id); the first two block what depends on them while the job learns in
    the background.
    """
    if not wait and job.snapshot().state is not JobState.FINISHED:
        return ExecutionBlocker(None), ExecutionBlocker(None), job.id
    snapshot = wait_for(job, keep_on_interrupt)
    if snapshot.concept_file is None:
        raise TrainingError(
            f"The training job {job.id} was stopped before its first step, or deleted, so there is "
            f"no concept to hand on. Queue the graph again to train it."
        )
    return read_concept(snapshot.concept_file), {"loss": job.losses()}, job.id


def _out_of_memory(config: TrainConfig, device: torch.device, error: Exception) -> str:
    free = comfy.model_management.get_free_memory(device)
    needed = ". ".join(str(error).split(". ")[:2])  # torch goes on with advice for programmers
    return (
        f"The memory of {device} was not enough for pictures of {config.resolution} px, one at a "
        f"time and with gradient checkpointing; {free / 1e9:.1f} GB are free ({needed}). Unload "
        f"other models or lower resolution, and train again."
    )
