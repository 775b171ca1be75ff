"""The models that trainings work on: private copies, made when a job's turn comes.

A job that waits holds none. It remembers which MODEL and CLIP it was queued with, without keeping
them alive; jobs of the same base that follow each other share one copy.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ....concept.errors import ModelsGoneError
from ....concept.text import TextEncoder
from ....trainer.config import TrainConfig
from ....trainer.jobs.fingerprint import Network, models_fingerprint
from ....trainer.methods import METHODS
from ...clip.pair import ClipTextEncoderPair
from ...clip.text_encoder import ClipTextEncoder
from ..models.text import text_encoder
from ..models.unet import ComfyDenoiser, denoiser_weights, training_dtype
from .prompts import prompt_is_running, prompts_begun

_POLL_S = 0.1


@dataclass(frozen=True)
class Models:
    """Copies that one training at a time works on."""

    denoiser: ComfyDenoiser
    encoder: ClipTextEncoder | ClipTextEncoderPair


def copy_models(model: Any, clip: Any, config: TrainConfig) -> Models:
    """Of a MODEL and a CLIP, patches applied. Raises IncompatibleModelError for what cannot be
    trained.
    """
    return Models(copy_unet(model, config), text_encoder(clip))


def copy_unet(model: Any, config: TrainConfig) -> ComfyDenoiser:
    return ComfyDenoiser(model, *_precision(config))


def unet_weights(model: Any, config: TrainConfig) -> Iterator[tuple[str, Tensor]]:
    """Those of `copy_unet`, without a copy of all: one at a time, to know a training again by."""
    return denoiser_weights(model, *_precision(config))


def _precision(config: TrainConfig) -> tuple[torch.dtype, bool]:
    """What the UNet computes in, and whether weights that are loaded in 8 bits stay so."""
    dtype = training_dtype(comfy.model_management.get_torch_device())
    return dtype, METHODS[config.method].leaves_network_frozen


class _Loaded:
    """The MODELs and CLIPs of one key that ComfyUI has still: a graph that is queued again, or a
    checkpoint that is loaded again, brings others with the same weights.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[weakref.ref[Any], weakref.ref[Any]]] = []

    def add(self, model: Any, clip: Any) -> None:
        alive = [pair for pair in self._pairs if None not in (pair[0](), pair[1]())]
        self._pairs = [*alive, (weakref.ref(model), weakref.ref(clip))]

    def newest(self) -> tuple[Any, Any] | None:
        pairs = ((model(), clip()) for model, clip in reversed(self._pairs))
        return next((pair for pair in pairs if None not in pair), None)

    def forget(self) -> None:
        self._pairs = []


def offer(model: Any, clip: Any, config: TrainConfig, encoder: TextEncoder) -> None:
    """Lets jobs of an equal base that wait use these, should what they were queued with be gone.
    `encoder` is a copy of the CLIP; of the MODEL none is made.
    """
    waiting = _loaded.get(_key_of(config, encoder, unet_weights(model, config)))
    if waiting:
        waiting.add(model, clip)


def _key_of(config: TrainConfig, encoder: TextEncoder, network: Network) -> str:
    # Where its products are computed is written into a text encoder's weights.
    own = (METHODS[config.method].leaves_network_frozen, config.text_encoder_on_cpu)
    return f"{own} {models_fingerprint(encoder, [network])}"


_loaded: weakref.WeakValueDictionary[str, _Loaded] = weakref.WeakValueDictionary()
"""By the key of the jobs that need them"""


class Base:
    """The MODEL and the CLIP that a job was queued with, or equal ones; it keeps none alive."""

    def __init__(self, model: Any, clip: Any, config: TrainConfig, models: Models) -> None:
        """`models` are copies of them, to know them again by."""
        self._config = config
        self.key = self._key_of(models)
        """Equal for jobs that can work on the same copy"""
        self._loaded = _loaded.setdefault(self.key, _Loaded())
        self._loaded.add(model, clip)

    @property
    def is_loaded(self) -> bool:
        """Whether ComfyUI has both still."""
        return self._loaded.newest() is not None

    def copy(self, should_leave: Callable[[], bool]) -> Models | None:
        """New copies, on the trainer thread: between two prompts, because a prompt moves and
        patches the weights that it uses. None where `should_leave` came first. Raises
        ModelsGoneError.
        """
        while True:
            while prompt_is_running():
                if should_leave():
                    return None
                time.sleep(_POLL_S)
            pair = self._loaded.newest()
            if pair is None:
                break
            model, clip = pair
            before = _state(model, clip)
            try:
                copies = copy_models(model, clip, self._config)
            except (LookupError, AttributeError, RuntimeError):  # a patch was taken off meanwhile?
                if _state(model, clip) == before:
                    raise
                continue
            if _state(model, clip) == before:
                if self._key_of(copies) == self.key:
                    return copies
                self._loaded.forget()  # they have been changed since
                break
        raise ModelsGoneError(
            "The model that this training was queued with is not loaded any more, so it waits. "
            "Queue its graph again: it resumes where it stopped."
        )

    def _key_of(self, models: Models) -> str:
        return _key_of(self._config, models.encoder, models.denoiser.network)


class SharedCopy:
    """The one copy that is kept from a job to the next, as long as that is of the same base."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key = ""
        self._models: Models | None = None

    def keep(self, base: Base, models: Models) -> None:
        with self._lock:
            self._key, self._models = base.key, models

    def drop(self) -> None:
        with self._lock:
            self._key, self._models = "", None

    def has(self, base: Base) -> bool:
        with self._lock:
            return self._models is not None and self._key == base.key

    def at_turn_of(self, base: Base, should_leave: Callable[[], bool]) -> Models | None:
        """The copy where it is the right one; else that goes, and a new one is made.

        None where `should_leave` came first. Raises ModelsGoneError.
        """
        with self._lock:
            if self._models is not None and self._key == base.key:
                return self._models
        self.drop()  # before the new one is made: they need not fit into memory together
        models = base.copy(should_leave)
        if models is not None:
            self.keep(base, models)
        return models


shared_copy = SharedCopy()


def _state(model: Any, clip: Any) -> tuple[Any, ...]:
    """Differs when a prompt has begun, or weights have moved or been patched, in between."""
    names = ("device", "current_weight_patches_uuid", "model_loaded_weight_memory")
    loaded = (model.model, clip.patcher.model)
    return prompts_begun(), *(getattr(one, name, None) for one in loaded for name in names)
