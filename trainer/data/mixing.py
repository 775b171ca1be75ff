"""Seg-Mix: cut-out subjects of two concepts side by side in one picture, and a caption that says
both (MuDI, Jang et al., NeurIPS 2024).

Where things that look alike are taught together, a training never sees them apart in one picture,
and the model mixes them. Their masks say what to cut out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from ...concept.errors import ConfigError
from ...concept.prompts import STYLE_TEMPLATE
from ...diffusion.latents import LATENT_PIXELS
from ...diffusion.protocols import LatentEncoder
from ...pictures.tensors import for_network, to_tensor
from ..config import TrainConfig
from .augmentation import View
from .buckets import Frame
from .captioned import GREY, CaptionedImage, Picture
from .latents import EncodedView, LatentBank, taught_places
from .training_concept import TrainingConcept

VIEWS = 48
"""Of each concept beside others, made before the training"""
_MARGIN = 1 / 8
"""Of the picture's width: how far at most a subject stands from its side"""
_INSIDE = 128
"""Shade of a mask from which on a pixel belongs to the subject"""


@dataclass(frozen=True)
class MixedView:
    """A view of two concepts' subjects."""

    view: View
    prompt: str
    subject_masks: Mapping[str, Tensor]
    """What a concept is called → where its subject is seen (S/8, S/8), in 0..1"""


def mixed_views(
    one: TrainingConcept,
    other: TrainingConcept,
    config: TrainConfig,
    count: int,
    frames: Sequence[Frame],
) -> Iterator[MixedView]:
    """The first `count` views of `one` beside `other`, in each of these frames in turn. They depend
    on these and on `config.seed` alone.
    """
    rng = random.Random(f"{config.seed} mixed {one.subject} {other.subject}")
    cut_outs = [
        [
            _cut_out(image.open(), max(map(max, frames)))
            for image in _taught(concept, config)
            if has_subject(image)
        ]
        for concept in (one, other)
    ]
    for number in range(count):
        pair = [rng.choice(pictures) for pictures in cut_outs]
        yield _side_by_side((one, other), pair, frames[number % len(frames)], config, rng)


def has_subject(image: CaptionedImage) -> bool:
    """Whether a mask says what of the picture is the subject."""
    return image.mask is not None or image.open().mask is not None


def check_masks(concepts: Sequence[TrainingConcept]) -> None:
    """Raises ConfigError where no picture says what of it is the subject."""
    if not any(has_subject(image) for concept in concepts for image in concept.images):
        raise ConfigError(
            "attention_weight keeps words inside the masks of the pictures, and no picture has a "
            "mask. Give masks, or set attention_weight to 0."
        )


def mixable(concepts: Sequence[TrainingConcept], config: TrainConfig) -> list[TrainingConcept]:
    """Those that can be cut out: things, of which a picture that trains has a mask. Raises
    ConfigError where there are no two.
    """
    if config.seg_mix_smallest > config.seg_mix_largest:
        raise ConfigError(
            f"seg_mix_smallest={config.seg_mix_smallest:g} is more than seg_mix_largest="
            f"{config.seg_mix_largest:g}. Swap them."
        )
    found = [
        concept
        for concept in concepts
        if concept.template != STYLE_TEMPLATE
        and any(has_subject(image) for image in _taught(concept, config))
    ]
    if len(found) < 2:
        names = ", ".join(concept.subject for concept in found) or "none"
        raise ConfigError(
            f"seg_mix={config.seg_mix:g} pastes the subjects of two concepts into one picture, so "
            f"it needs two things that are trained together and whose pictures have masks; such "
            f"are here: {names}. Give masks to the pictures of two concepts, or set seg_mix to 0."
        )
    return found


def with_mixed(
    banks: Sequence[LatentBank],
    concepts: Sequence[TrainingConcept],
    config: TrainConfig,
    encoder: LatentEncoder,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LatentBank]:
    """The banks of a run with views of each concept beside each other one. Raises as `mixable`."""
    things = mixable(concepts, config)
    frames = [sorted({views[0].frame for views in bank.instances}) for bank in banks]
    count = max(-(-VIEWS // (len(things) - 1)), *map(len, frames))
    total, done = len(things) * (len(things) - 1) * count, 0
    mixed = []
    for bank, concept, seen in zip(banks, concepts, frames, strict=True):
        views = []
        for other in things if concept in things else ():
            if other is concept:
                continue
            for one in mixed_views(concept, other, config, count, seen):
                mean, deviation = encoder.moments(one.view.image_chw)
                mask, sizes = one.view.mask, one.view.sizes
                about = one.subject_masks, concept.weight
                views.append(EncodedView(mean, deviation, mask, one.prompt, sizes, *about))
                on_progress(done := done + 1, total)
        mixed.append(replace(bank, mixed=tuple(views)))
    return mixed


def _taught(concept: TrainingConcept, config: TrainConfig) -> list[CaptionedImage]:
    return [concept.images[place] for place in taught_places(concept, config)]


def _cut_out(picture: Picture, size: int) -> Picture:
    """The subject alone, no larger than a view: what the mask's white pixels enclose, and which."""
    assert picture.mask is not None, "asked of pictures with a mask alone"
    inside = picture.mask.point(lambda shade: 255 if shade >= _INSIDE else 0)
    inside = inside if inside.getbbox() else picture.mask
    image, mask = (whole.crop(inside.getbbox()) for whole in (picture.image, inside))
    image.thumbnail((size, size), Image.Resampling.BICUBIC)
    return Picture(image, mask.resize(image.size, Image.Resampling.BILINEAR))


def _side_by_side(
    concepts: Sequence[TrainingConcept],
    pair: Sequence[Picture],
    frame: Frame,
    config: TrainConfig,
    rng: random.Random,
) -> MixedView:
    """Each in its half of the picture, give or take the margin; either may stand in front."""
    across, down = frame
    canvas = Image.new("RGB", frame, GREY)
    places = [Image.new("L", frame) for _ in pair]
    first_is_left = rng.random() < 0.5
    order = [0, 1] if rng.random() < 0.5 else [1, 0]
    for index in order:
        picture, mask = pair[index].image, pair[index].mask
        assert mask is not None
        share = rng.uniform(config.seg_mix_smallest, config.seg_mix_largest)
        scale = share * min(across / 2 / picture.width, down / picture.height)
        width, height = (max(round(scale * side), 1) for side in picture.size)
        margin = rng.randint(0, int(_MARGIN * across))
        left = margin if (index == 0) == first_is_left else across - margin - width
        top = rng.randint(0, down - height)
        if config.flip and rng.random() < 0.5:
            picture, mask = ImageOps.mirror(picture), ImageOps.mirror(mask)
        small = mask.resize((width, height), Image.Resampling.BILINEAR)
        canvas.paste(
            picture.resize((width, height), Image.Resampling.BICUBIC), (left, top), mask=small
        )
        behind = places[1 - index]
        behind.paste(0, (left, top), mask=small)  # what stands in front hides it
        places[index].paste(small, (left, top))
    seen = [functional.avg_pool2d(to_tensor(place)[None], LATENT_PIXELS)[0] for place in places]
    one, other = concepts
    whole = (down, across, 0, 0, down, across)
    return MixedView(
        View(for_network(canvas), sum(seen[1:], seen[0]).clamp(max=1), "", whole),
        f"{one.prompt} and a {other.subject}",
        {concept.subject: mask for concept, mask in zip(concepts, seen, strict=True)},
    )
