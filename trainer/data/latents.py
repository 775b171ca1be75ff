"""The latent bank: views are encoded once, before training, and drawn from at every step."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TypeVar

from torch import Tensor

from ...concept.errors import DataError
from ...diffusion.latents import LATENT_PIXELS
from ...diffusion.protocols import LatentEncoder, Sizes
from ..config import TrainConfig
from .augmentation import View, random_view, whole_view
from .buckets import LONGEST, Frame, bucket_for, shared_out
from .captioned import CaptionedImage, Picture
from .training_concept import TrainingConcept
from .wording import Wording

T = TypeVar("T")
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
    weight: float = 1.0
    """What it counts, beside others of the run"""
    wording: Wording | None = None
    """What else may be said of it; None where it always has its prompt"""

    @property
    def frame(self) -> Frame:
        height, width = self.mask.shape
        return width * LATENT_PIXELS, height * LATENT_PIXELS


@dataclass(frozen=True)
class LatentBank:
    """All views a run can draw: several an instance image, one a regularization image; of each
    resolution, where there are several.

    An image stands here as often as it has repeats, with the same views: a reference, no copy.
    """

    instances: tuple[tuple[EncodedView, ...], ...]
    """Those of an image side by side are all of one frame."""
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
    frames = [frames_of(image.size(), config) for image in concept.images]
    guards = regularization_frames(concept, frames, config)
    counts = Counter(frame for each in frames for frame in each for _ in range(per_image))
    counts.update(frame for _, frame in guards)
    means, deviations, masks = (_Blocks(counts) for _ in range(3))
    seen: dict[bytes, tuple[Tensor, Tensor]] = {}
    done = 0

    def encode(prompt: str, view: View, image: CaptionedImage | None = None) -> EncodedView:
        nonlocal done
        key = hashlib.sha256(view.image_chw.contiguous().numpy().data).digest()
        key += repr(view.frame).encode()  # the same bytes may be upright or wide
        if key not in seen:
            mean, deviation = encoder.moments(view.image_chw)
            seen[key] = means.keep(mean, view), deviations.keep(deviation, view)
        on_progress(done := done + 1, counts.total())
        mask = masks.keep(view.mask, view)
        encoded = EncodedView(*seen[key], mask, prompt, view.sizes)
        if image is None:
            return encoded
        return replace(
            encoded,
            subject_masks={concept.subject: mask},
            weight=concept.weight * image.weight,
            wording=Wording(view.prefix, image.captions, concept.prompt),
        )

    views = instance_views(concept.images, per_image, config)
    instances = [
        [tuple(encode(*view, image) for view in islice(views, per_image)) for _ in each]
        for each, image in zip(frames, concept.images, strict=True)
    ]
    regularization = [
        (encode(image.caption, regularization_view(image, frame, config)),)
        for image, frame in guards
    ]
    taught = taught_places(concept, config)
    if not taught:
        raise DataError(
            f"The weights of all pictures of the {concept.class_noun} that are not kept back are "
            f"0, so nothing could be learnt. Give more pictures a weight, or keep back fewer."
        )
    return LatentBank(
        _repeated([instances[n] for n in taught], [concept.images[n] for n in taught]),
        _repeated(regularization, [image for image, _ in guards]),
        tuple(views for n in kept_back(config, len(instances)) for views in instances[n]),
    )


def frames_of(size: tuple[int, int], config: TrainConfig) -> list[Frame]:
    """What a picture of so many pixels (width, height) is seen in, at each resolution."""
    if config.fit == "buckets":
        return [bucket_for(*size, edge) for edge in config.resolutions]
    return [(edge, edge) for edge in config.resolutions]


def regularization_frames(
    concept: TrainingConcept, frames: Sequence[Sequence[Frame]], config: TrainConfig
) -> list[tuple[CaptionedImage, Frame]]:
    """The regularization images and what each is cut to: the frames of the concept's own pictures
    that steps draw, since a step needs both side by side.
    """
    counts: Counter[Frame] = Counter()
    for place in taught_places(concept, config):
        for frame in frames[place]:
            counts[frame] += concept.images[place].repeats
    if not counts:  # refused when they are encoded
        return []
    images = concept.regularization
    shared = shared_out([image.size() for image in images], counts) if images else []
    return [(images[place], frame) for place, frame in shared]


def taught_places(concept: TrainingConcept, config: TrainConfig) -> list[int]:
    """The places of the images that steps draw: all but those that are kept back or weigh nothing;
    none where more are to be kept back than there are.
    """
    if config.validation_pictures >= len(concept.images):
        return []
    back = kept_back(config, len(concept.images))
    pairs = enumerate(concept.images)
    return [place for place, image in pairs if place not in back and image.weight > 0]


def kept_back(config: TrainConfig, images: int) -> list[int]:
    """The places of the images of a concept that a run keeps back for validation, of so many."""
    rng = random.Random(f"{config.seed} kept back")
    return sorted(rng.sample(range(images), config.validation_pictures))


class _Blocks:
    """Tensors of one shape, side by side. Each for itself they would lie between the photographs
    that come and go, and the memory of those could not be used again.
    """

    def __init__(self, most: Mapping[Frame, int]) -> None:
        self._most = most
        self._blocks: dict[Frame, Tensor] = {}
        self._kept: Counter[Frame] = Counter()

    def keep(self, tensor: Tensor, view: View) -> Tensor:
        """A copy in the block of the view's frame."""
        frame = view.frame
        if frame not in self._blocks:
            self._blocks[frame] = tensor.new_empty(self._most[frame], *tensor.shape)
        kept = self._blocks[frame][self._kept[frame]].copy_(tensor)
        self._kept[frame] += 1
        return kept


def _repeated(items: Sequence[Sequence[T]], images: Sequence[CaptionedImage]) -> tuple[T, ...]:
    pairs = zip(items, images, strict=True)
    return tuple(item for each, image in pairs for _ in range(image.repeats) for item in each)


def instance_views(
    images: Sequence[CaptionedImage], per_image: int, config: TrainConfig
) -> Iterator[tuple[str, View]]:
    """The first `per_image` views of each with their prompts, image by image and resolution by
    resolution. They depend on `config.seed` alone.
    """
    rng = random.Random(config.seed)
    for captioned in images:
        picture = captioned.open()
        for frame in frames_of(picture.image.size, config):
            _whole_view(captioned.name, picture, frame, config)  # raises where nothing counts
            for index in range(per_image):
                flip = config.flip and index % 2 == 1  # every other view
                if config.augment:
                    view = random_view(picture, frame, rng, flip, config.fit)
                else:
                    view = whole_view(picture, frame, flip, config.fit)
                yield f"{view.prefix} {captioned.caption}".strip(), view


def views_per_image(config: TrainConfig, images: int) -> int:
    """How many views a run makes of each of so many images, at each resolution: fewer of each where
    there are many, so that latents of hundreds of photographs do not fill the memory.
    """
    if config.augment:
        most = _MOST_VIEWS // (images * len(config.resolutions))
        return min(config.views_per_image, max(_FEWEST_VIEWS, most))
    return 2 if config.flip else 1


def regularization_view(captioned: CaptionedImage, frame: Frame, config: TrainConfig) -> View:
    """Regularization images are neither resized nor mirrored."""
    return _whole_view(captioned.name, captioned.open(), frame, config)


def _whole_view(name: str, picture: Picture, frame: Frame, config: TrainConfig) -> View:
    width, height = picture.image.size
    if config.fit == "letterbox" and max(width, height) > LONGEST * min(width, height):
        raise DataError(
            f"{name} is {width} x {height} pixels, too long for a letterbox. Crop it, or set fit "
            f"to 'buckets'."
        )
    view = whole_view(picture, frame, fit=config.fit)
    if view.mask.sum() < 1:
        seen = "square" if config.fit == "crop" else "part"
        raise DataError(
            f"The mask of {name} leaves less than {LATENT_PIXELS} x {LATENT_PIXELS} pixels to "
            f"learn in the middle {seen} of the picture. Set fit to 'letterbox', or paint a larger "
            f"mask."
        )
    return view
