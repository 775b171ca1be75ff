"""The latent bank: views are encoded once, before training, and drawn from at every step."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TypeVar

import torch
from torch import Tensor

from ..concept.errors import DataError
from .augmentation import View, random_view, whole_view
from .config import LATENT_PIXELS, TrainConfig
from .data import CaptionedImage, Picture, TrainingConcept
from .protocols import LatentEncoder, Sizes

T = TypeVar("T")
MOST_ELONGATED = 4
"""Sides of a picture that fits into a letterbox: beyond, almost all of a view would be grey."""


@dataclass(frozen=True)
class EncodedView:
    """Mean and deviation (4, h, w) of a view's latents, its valid region (h, w), its prompt, and
    where it comes from.
    """

    mean: Tensor
    deviation: Tensor
    mask: Tensor
    prompt: str
    sizes: Sizes


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
    per_image = views_per_image(config)
    total = len(concept.images) * per_image + len(concept.regularization)
    done = 0

    def encode(prompt: str, view: View) -> EncodedView:
        nonlocal done
        mean, deviation = encoder.moments(view.image_chw)
        on_progress(done := done + 1, total)
        return EncodedView(mean, deviation, view.mask, prompt, view.sizes)

    views = [encode(prompt, view) for prompt, view in instance_views(concept, config)]
    instances = tuple(
        tuple(views[start : start + per_image]) for start in range(0, len(views), per_image)
    )
    regularization = tuple(
        encode(captioned.caption, regularization_view(captioned, config))
        for captioned in concept.regularization
    )
    return LatentBank(instances, regularization)


def instance_views(concept: TrainingConcept, config: TrainConfig) -> Iterator[tuple[str, View]]:
    """All views of a run with their prompts, image by image. They depend on `config.seed` alone."""
    rng = random.Random(config.seed)
    for captioned in concept.images:
        picture = captioned.open()
        _whole_view(captioned.name, picture, config)  # raises where nothing of it counts
        for index in range(views_per_image(config)):
            flip = config.flip and index % 2 == 1  # every other view
            if config.augment:
                view = random_view(picture, config.resolution, rng, flip, config.fit)
            else:
                view = whole_view(picture, config.resolution, flip, config.fit)
            yield f"{view.prefix} {captioned.caption}".strip(), view


def views_per_image(config: TrainConfig) -> int:
    if config.augment:
        return config.views_per_image
    return 2 if config.flip else 1


def regularization_view(captioned: CaptionedImage, config: TrainConfig) -> View:
    """Regularization images are neither resized nor mirrored."""
    return _whole_view(captioned.name, captioned.open(), config)


def _whole_view(name: str, picture: Picture, config: TrainConfig) -> View:
    width, height = picture.image.size
    if config.fit == "letterbox" and max(width, height) > MOST_ELONGATED * min(width, height):
        raise DataError(
            f"{name} is {width} x {height} pixels, too long for a letterbox. Crop it, or set fit "
            f"to 'crop'."
        )
    view = whole_view(picture, config.resolution, fit=config.fit)
    if view.mask.sum() < 1:
        raise DataError(
            f"What the mask of {name} lets count is less than {LATENT_PIXELS} x {LATENT_PIXELS} "
            f"pixels, or outside the middle square of the picture. Set fit to 'letterbox', or "
            f"paint a larger mask."
        )
    return view


@dataclass(frozen=True)
class Batch:
    """What one step is trained on. The last `prior` samples are regularization images."""

    latents_bchw: Tensor
    masks_bhw: Tensor
    prompts: tuple[str, ...]
    sizes: Tensor
    """`Sizes` of each, (b, 6)"""
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
            sizes=torch.tensor([view.sizes for view in views]),
            prior=prior,
        )


def _shuffled(items: Sequence[T], rng: random.Random) -> Iterator[T]:
    while True:
        yield from rng.sample(items, len(items))


def _in_turn(streams: Sequence[Iterator[T]]) -> Iterator[T]:
    for stream in cycle(streams):
        yield next(stream)
