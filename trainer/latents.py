"""The latent bank: views are encoded once, before training, and drawn from at every step."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TypeVar

import torch
from torch import Tensor

from .augmentation import View, random_view, whole_view
from .config import TrainConfig
from .data import TrainingConcept
from .protocols import LatentEncoder

T = TypeVar("T")


@dataclass(frozen=True)
class EncodedView:
    """Mean and deviation (4, h, w) of a view's latents, its valid region (h, w) and its prompt."""

    mean: Tensor
    deviation: Tensor
    mask: Tensor
    prompt: str


@dataclass(frozen=True)
class LatentBank:
    """All views a run can draw: several an instance image, one a regularization image."""

    instances: tuple[tuple[EncodedView, ...], ...]
    regularization: tuple[EncodedView, ...]


def encode_views(
    concept: TrainingConcept,
    encoder: LatentEncoder,
    config: TrainConfig,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LatentBank:
    """Draws and encodes the views of a run. Random choices depend on `config.seed` alone."""
    rng = random.Random(config.seed)
    per_image = config.views_per_image if config.augment else (2 if config.flip else 1)
    total = len(concept.images) * per_image + len(concept.regularization)
    done = 0

    def encode(view: View, caption: str) -> EncodedView:
        nonlocal done
        mean, deviation = encoder.moments(view.image_chw)
        on_progress(done := done + 1, total)
        return EncodedView(mean, deviation, view.mask, f"{view.prefix} {caption}".strip())

    instances = []
    for captioned in concept.images:
        image = captioned.open()
        views = []
        for index in range(per_image):
            flip = config.flip and index % 2 == 1  # every other view
            if config.augment:
                view = random_view(image, config.resolution, rng, flip)
            else:
                view = whole_view(image, config.resolution, flip)
            views.append(encode(view, captioned.caption))
        instances.append(tuple(views))
    regularization = tuple(
        encode(whole_view(captioned.open(), config.resolution), captioned.caption)
        for captioned in concept.regularization
    )
    return LatentBank(tuple(instances), regularization)


@dataclass(frozen=True)
class Batch:
    """What one step is trained on. The last `prior` samples are regularization images."""

    latents_bchw: Tensor
    masks_bhw: Tensor
    prompts: tuple[str, ...]
    prior: int


def batches(
    banks: Sequence[LatentBank],
    config: TrainConfig,
    rng: random.Random,
    generator: torch.Generator,
) -> Iterator[Batch]:
    """Endless batches: concepts take turns, every image of a concept comes up equally often, its
    views and latents are drawn at random.
    """
    instances = _in_turn([_shuffled(bank.instances, rng) for bank in banks])
    regularization = _in_turn(
        [_shuffled(bank.regularization, rng) for bank in banks if bank.regularization]
    )
    prior = config.batch_size // 2 if any(bank.regularization for bank in banks) else 0
    while True:
        views = [rng.choice(next(instances)) for _ in range(config.batch_size - prior)]
        views += [next(regularization) for _ in range(prior)]
        mean, deviation = (
            torch.stack([getattr(v, k) for v in views]) for k in ("mean", "deviation")
        )
        yield Batch(
            latents_bchw=mean + deviation * torch.randn(mean.shape, generator=generator),
            masks_bhw=torch.stack([view.mask for view in views]),
            prompts=tuple(view.prompt for view in views),
            prior=prior,
        )


def _shuffled(items: Sequence[T], rng: random.Random) -> Iterator[T]:
    while True:
        yield from rng.sample(items, len(items))


def _in_turn(streams: Sequence[Iterator[T]]) -> Iterator[T]:
    for stream in cycle(streams):
        yield next(stream)
