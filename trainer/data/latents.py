"""The latent bank: views are encoded once, before training, and drawn from at every step."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from ...concept.errors import DataError
from ...diffusion.latents import LATENT_PIXELS
from ...diffusion.protocols import LatentEncoder, Sizes
from ..config import TrainConfig
from .augmentation import View, random_view, whole_view
from .captioned import CaptionedImage, Picture
from .training_concept import TrainingConcept

T = TypeVar("T")
MOST_ELONGATED = 4
"""Sides of a picture that fits into a letterbox: beyond, almost all of a view would be grey."""
_MOST_VIEWS = 320
"""Of all images: twenty, the most that are asked for, have sixteen each"""
_FEWEST_VIEWS = 2


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
    subject_masks: Mapping[str, Tensor] = field(default_factory=dict)
    """What a concept is called → where its subject is seen (h, w), in 0..1"""


@dataclass(frozen=True)
class LatentBank:
    """All views a run can draw: several an instance image, one a regularization image.

    An image stands here as often as it has repeats, with the same views: a reference, no copy.
    """

    instances: tuple[tuple[EncodedView, ...], ...]
    regularization: tuple[EncodedView, ...]
    kept_back: tuple[tuple[EncodedView, ...], ...] = ()
    """Views of images that no step draws"""
    mixed: tuple[EncodedView, ...] = ()
    """Views of the concept's subject beside another's (`mixing.py`)"""


def encode_views(
    concept: TrainingConcept,
    encoder: LatentEncoder,
    config: TrainConfig,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LatentBank:
    """Draws and encodes the views of a run. Random choices depend on `config.seed` alone; those of
    an image are the same whether another one is kept back or not.

    A picture is opened when its turn comes and let go after it; views that are equal to the bit are
    encoded once, and share what came of it.
    """
    per_image = views_per_image(config, len(concept.images))
    total = len(concept.images) * per_image + len(concept.regularization)
    done = 0
    means, deviations, masks = (_Block(total) for _ in range(3))
    seen: dict[bytes, tuple[Tensor, Tensor]] = {}

    def encode(prompt: str, view: View) -> EncodedView:
        nonlocal done
        key = hashlib.sha256(view.image_chw.contiguous().numpy().data).digest()
        if key not in seen:
            mean, deviation = encoder.moments(view.image_chw)
            seen[key] = means.keep(mean), deviations.keep(deviation)
        on_progress(done := done + 1, total)
        mask = masks.keep(view.mask)
        return EncodedView(*seen[key], mask, prompt, view.sizes, {concept.subject: mask})

    views = [encode(*view) for view in instance_views(concept.images, per_image, config)]
    instances = [
        tuple(views[start : start + per_image]) for start in range(0, len(views), per_image)
    ]
    regularization = [
        encode(captioned.caption, regularization_view(captioned, config))
        for captioned in concept.regularization
    ]
    back = kept_back(config, len(concept.images))
    taught = [place for place in range(len(instances)) if place not in back]
    return LatentBank(
        _repeated([instances[n] for n in taught], [concept.images[n] for n in taught]),
        _repeated(regularization, concept.regularization),
        tuple(instances[place] for place in back),
    )


def kept_back(config: TrainConfig, images: int) -> list[int]:
    """The places of the images of a concept that a run keeps back for validation, of so many."""
    rng = random.Random(f"{config.seed} kept back")
    return sorted(rng.sample(range(images), config.validation_pictures))


class _Block:
    """Tensors of one shape, side by side. Each for itself they would lie between the photographs
    that come and go, and the memory of those could not be used again.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._block: Tensor | None = None
        self._kept = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy in the block."""
        if self._block is None:
            self._block = tensor.new_empty(self._most, *tensor.shape)
        kept = self._block[self._kept].copy_(tensor)
        self._kept += 1
        return kept


def _repeated(items: Sequence[T], images: Sequence[CaptionedImage]) -> tuple[T, ...]:
    pairs = zip(items, images, strict=True)
    return tuple(item for item, image in pairs for _ in range(image.repeats))


def instance_views(
    images: Sequence[CaptionedImage], per_image: int, config: TrainConfig
) -> Iterator[tuple[str, View]]:
    """The first `per_image` views of each with their prompts, image by image. They depend on
    `config.seed` alone.
    """
    rng = random.Random(config.seed)
    for captioned in images:
        picture = captioned.open()
        _whole_view(captioned.name, picture, config)  # raises where nothing of it counts
        for index in range(per_image):
            flip = config.flip and index % 2 == 1  # every other view
            if config.augment:
                view = random_view(picture, config.resolution, rng, flip, config.fit)
            else:
                view = whole_view(picture, config.resolution, flip, config.fit)
            yield f"{view.prefix} {captioned.caption}".strip(), view


def views_per_image(config: TrainConfig, images: int) -> int:
    """How many views a run makes of each of so many images: fewer of each where there are many, so
    that latents of hundreds of photographs do not fill the memory.
    """
    if config.augment:
        return min(config.views_per_image, max(_FEWEST_VIEWS, _MOST_VIEWS // images))
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
            f"The mask of {name} leaves less than {LATENT_PIXELS} x {LATENT_PIXELS} pixels to "
            f"learn in the middle square of the picture. Set fit to 'letterbox', or paint a larger "
            f"mask."
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


def batch_of_step(
    banks: Sequence[LatentBank],
    config: TrainConfig,
    step: int,
    rng: random.Random,
    generator: torch.Generator,
) -> Batch:
    """What step `step` (from 0 on) is trained on: concepts take turns, every image of a concept
    comes up equally often, its views and latents are drawn at random.
    """
    instances = [bank.instances for bank in banks]
    regularization = [bank.regularization for bank in banks if bank.regularization]
    prior = config.batch_size // 2 if regularization else 0
    taught = config.batch_size - prior
    turns = range(step * taught, (step + 1) * taught)
    views = [
        _drawn(
            _in_turn(instances, turn, f"{config.seed} images"),
            banks[turn % len(banks)].mixed,
            config,
            rng,
        )
        for turn in turns
    ]
    turns = range(step * prior, (step + 1) * prior)
    views += [_in_turn(regularization, turn, f"{config.seed} regularization") for turn in turns]
    mean, deviation = (torch.stack([getattr(v, k) for v in views]) for k in ("mean", "deviation"))
    return Batch(
        latents_bchw=mean + deviation * torch.randn(mean.shape, generator=generator),
        masks_bhw=torch.stack([view.mask for view in views]),
        prompts=tuple(view.prompt for view in views),
        sizes=torch.tensor([view.sizes for view in views]),
        prior=prior,
    )


def _drawn(
    of_image: Sequence[EncodedView],
    mixed: Sequence[EncodedView],
    config: TrainConfig,
    rng: random.Random,
) -> EncodedView:
    """A view of an image, or with the probability of Seg-Mix one of its subject beside another."""
    view = rng.choice(of_image)
    if mixed and rng.random() < config.seg_mix:
        return rng.choice(mixed)
    return view


def step_randomness(seed: int, step: int) -> tuple[random.Random, torch.Generator]:
    """Everything random of a step follows from the run's seed and the number of the step: so a run
    goes on from any step without its past.
    """
    rng = random.Random(f"{seed} step {step}")
    return rng, torch.Generator().manual_seed(rng.getrandbits(32))


def _in_turn(lists: Sequence[Sequence[T]], turn: int, seed: str) -> T:
    """What comes at a turn when lists take turns, each in another order every time around."""
    turn, which = divmod(turn, len(lists))
    items = lists[which]
    time_around, place = divmod(turn, len(items))
    return items[_order(f"{seed} {which} {time_around}", len(items))[place]]


@lru_cache(maxsize=64)
def _order(seed: str, count: int) -> list[int]:
    return random.Random(seed).sample(range(count), count)
