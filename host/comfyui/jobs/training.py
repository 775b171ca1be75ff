"""Starting a training from a node."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from comfy_execution.graph_utils import ExecutionBlocker

from ....concept.concept import Concept
from ....concept.errors import TrainingError
from ....concept.file import read_concept, write_concept
from ....merge.projection import project_on_own_words
from ....trainer.checkpoint import Checkpoint
from ....trainer.config import TrainConfig
from ....trainer.events import Event
from ....trainer.jobs.fingerprint import training_fingerprint
from ....trainer.jobs.job import Job
from ....trainer.jobs.own_files import OwnFiles
from ....trainer.jobs.snapshot import JobState
from ....trainer.jobs.work import Work, never
from ....trainer.learning.network_file import fold_in, write_network
from ....trainer.methods import METHODS
from ....trainer.request import TrainingRequest
from ....trainer.teach import prepared
from ..models.parts import check_models
from ..models.text import text_encoder
from ..models.unet import ComfyDenoiser, ComfyLatentEncoder
from ..paths import cache_folder, concept_folder, network_folder
from .models import Base, Models, copy_unet, offer, shared_copy, unet_weights
from .progress import Preparation
from .prompts import prompt_is_running
from .service import tell_node, training_service, wait_for

log = logging.getLogger("custom_diffusion")


@dataclass(frozen=True)
class Origin:
    """Where a request came from: a node, and the models that it was given."""

    model: Any
    clip: Any
    vae: Any
    prompt: Mapping[str, Any]
    """The graph that is executed, as it was sent; empty where there is none"""
    node_id: str


def start_training(
    name: str,
    request: TrainingRequest,
    origin: Origin,
    *,
    checkpoint_every_steps: int,
    share_device: bool,
    keep_best: int,
) -> Job:
    """Encodes the pictures and queues the job. Runs on the prompt thread.

    Everything that needs ComfyUI's own models happens here; the job touches only its copies.
    A job that had the same to do is not begun anew: it goes on, or is handed out when it has
    finished, and nothing is copied. What the node needs of the prompt is kept, so that the job can
    be gone on with in another process.
    """
    with Preparation(name, origin.node_id) as preparation:
        service, config, model, clip = training_service(), request.config, origin.model, origin.clip
        check_models(model, clip, origin.vae)
        preparation.doing("reading")
        encoder = text_encoder(clip)
        networks = (unet_weights(model, config), origin.vae.first_stage_model)
        fingerprint = f"{name} {training_fingerprint(request, encoder, networks)}"
        if same := service.join(fingerprint, config.steps, config.ends_early):
            log.info("the training job %s had the same to do: it is not begun again", same.id)
            if not same.snapshot().ended:
                offer(model, clip, config, encoder)
            return same
        preparation.doing("copying")
        models = Models(copy_unet(model, config), encoder)
        base = Base(model, clip, config, models)
        latent_encoder = ComfyLatentEncoder(origin.vae, model.model.latent_format.scale_factor)
        run = prepared(request, models.denoiser, encoder, latent_encoder, preparation.encoding)
        _make_room(models.denoiser)
        training = _Training(
            name, config, base, partial(run, checkpoint_every_steps=checkpoint_every_steps)
        )
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
            {**_description(request, origin), "keep_best": keep_best},
            work,
            fingerprint,
            config.ends_early,
            on_next=lambda: shared_copy.keep(base, models),
        )


def _description(request: TrainingRequest, origin: Origin) -> dict[str, Any]:
    """What the job's folder says of it."""
    concepts, earlier = request.concepts, request.earlier
    return {
        "concepts": [{"token": c.token, "class_noun": c.class_noun} for c in concepts],
        "start": earlier.describe() if earlier else None,
        "config": request.config.as_json(),
        "graph": graph_until(origin.prompt, origin.node_id),
        "node": origin.node_id,
    }


class _Training:
    """A run, from the turn of its job on. Until then, and after it, it holds no models."""

    def __init__(
        self, name: str, config: TrainConfig, base: Base, run: Callable[..., Concept]
    ) -> None:
        self._name, self._config, self._base, self._run = name, config, base, run
        self._method = METHODS[config.method]
        self._models: Models | None = None

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
            return self._run(
                denoiser,
                self._models.encoder,
                checkpoint=checkpoint,
                should_stop=should_stop,
                on_event=on_event,
            )
        except torch.OutOfMemoryError as error:
            raise TrainingError(_out_of_memory(self._config, denoiser.device, error)) from error

    def save(self, result: Concept, own_files: OwnFiles) -> Path:
        assert self._models is not None, "its turn is over"
        if self._method.whole_network:
            denoiser = self._models.denoiser
            result = fold_in(denoiser, result)
            write = partial(write_network, denoiser.network)
            network = own_files.write_named(network_folder(), self._name, write)
            log.info("saved the whole UNet: %s", network)
        if result.scope == "own words":
            # The job's folder keeps the whole of it; this is small and acts right in any loader.
            result, _ = project_on_own_words(
                result, self._models.encoder, cache_folder=cache_folder()
            )
        return own_files.write_named(concept_folder(), self._name, partial(write_concept, result))


def _make_room(denoiser: ComfyDenoiser) -> None:
    """Lets ComfyUI unload what it holds on the device, as it would for a model of its own: enough
    for what of the network has to move there, and for what ComfyUI sets aside to draw.
    """
    device = comfy.model_management.get_torch_device()
    tensors = denoiser.network.state_dict().values()
    needed = sum(tensor.nbytes for tensor in tensors if tensor.device.type != device.type)
    needed += comfy.model_management.minimum_inference_memory()
    comfy.model_management.free_memory(needed, device)


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


def training_outputs(
    job: Job, wait: bool, keep_on_interrupt: bool, node_id: str
) -> tuple[Any, Any, str]:
    """(concept, loss map, job id); the first two block what depends on them while the job learns in
    the background. The page hears which it is.
    """
    in_background = not wait and job.snapshot().state is not JobState.FINISHED
    if not in_background:
        tell_node(node_id, job=job.id, blocks=False)
        in_background = not (snapshot := wait_for(job, keep_on_interrupt)).ended
    if in_background:
        tell_node(node_id, job=job.id, blocks=True)
        return ExecutionBlocker(None), ExecutionBlocker(None), job.id
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
