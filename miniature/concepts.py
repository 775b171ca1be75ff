"""Concepts of the miniature world: an endless family of looks and styles that no picture had.

A concept is an object of a known class with two rare colours, a pattern and a mark.
Seeds 2n and 2n + 1 make a pair: different classes, and no colour in common.
"""

from __future__ import annotations

import random
from dataclasses import replace

from PIL import Image
from torch import Tensor

from ..pictures.tensors import to_hwc, to_picture
from ..trainer.data.captioned import CaptionedImage
from ..trainer.data.training_concept import TrainingConcept, instance_caption
from .drawing import draw
from .model import PICTURE_EDGE
from .world import (
    MARKS,
    PATTERNS,
    RARE_HUES,
    SHAPES,
    Look,
    Style,
    random_caption,
    random_look,
    random_scene,
    rare_color,
)

INSTANCE_IMAGES = 8
REGULARIZATION_IMAGES = 200
_SEEN = 0.05
"""From this difference on a pixel is an object's, not the background's"""


def concept_look(seed: int) -> Look:
    """The look of a concept."""
    rng = random.Random(f"pair {seed // 2}")
    shapes, hues = rng.sample(SHAPES, 2), rng.sample(list(RARE_HUES), 4)
    of_pair = seed % 2
    rng = random.Random(f"concept {seed}")
    main, second = hues[2 * of_pair : 2 * of_pair + 2]
    return Look(
        shape=shapes[of_pair],
        color=rare_color(rng, main),
        pattern=rng.choice(PATTERNS[1:]),
        second_color=rare_color(rng, second),
        mark=rng.choice(MARKS[1:]),
    )


def concept_style(seed: int) -> Style:
    """A way to draw everything, in two rare colours, the dark one much darkened."""
    rng = random.Random(f"style {seed}")
    dark, light = (rare_color(rng, hue) for hue in rng.sample(list(RARE_HUES), 2))
    return Style(dark=(0.35 * dark[0], 0.35 * dark[1], 0.35 * dark[2]), light=light, hatched=True)


def concept_pictures(look: Look, count: int, seed: int, edge: int = PICTURE_EDGE) -> Tensor:
    """Pictures (count, 3, edge, edge) in 0..1 of the look alone, anywhere, on any background."""
    rng = random.Random(f"pictures {seed}")
    return draw([random_scene(rng, [look]) for _ in range(count)], edge)


def concept_masks(look: Look, count: int, seed: int, edge: int = PICTURE_EDGE) -> Tensor:
    """Masks (count, 3, edge, edge) of the same pictures: white where the object is."""
    rng = random.Random(f"pictures {seed}")
    scenes = [random_scene(rng, [look]) for _ in range(count)]
    # On the one background that no mark blends into.
    scenes = [replace(scene, background="at night", tint=(0.0, 0.0, 0.0)) for scene in scenes]
    grounds = [replace(scene, objects=()) for scene in scenes]
    differs = (draw(scenes, edge) - draw(grounds, edge)).abs().amax(1, keepdim=True) > _SEEN
    return differs.float().expand(-1, 3, -1, -1)


def training_concept(
    look: Look,
    token: str,
    seed: int,
    regularization: tuple[CaptionedImage, ...] = (),
    masked: bool = False,
) -> TrainingConcept:
    """What a user would bring: a few pictures of the concept, masks or not, and the word for its
    class.
    """
    caption = instance_caption(token, look.shape)
    pictures = map(to_picture, to_hwc(concept_pictures(look, INSTANCE_IMAGES, seed)))
    masks: list[Image.Image | None] = [None] * INSTANCE_IMAGES
    if masked:
        drawn = to_hwc(concept_masks(look, INSTANCE_IMAGES, seed))
        masks = [to_picture(mask).convert("L") for mask in drawn]
    return TrainingConcept(
        images=tuple(
            CaptionedImage(picture, caption, mask)
            for picture, mask in zip(pictures, masks, strict=True)
        ),
        class_noun=look.shape,
        token=token,
        regularization=regularization,
    )


def class_pictures(shape: str, count: int, seed: int) -> tuple[CaptionedImage, ...]:
    """Captioned pictures of other objects of the class: a regularization set."""
    rng = random.Random(f"class {shape} {seed}")
    looks = [random_look(rng, shape) for _ in range(count)]
    scenes = [random_scene(rng, [look]) for look in looks]
    captions = [random_caption(scene, rng) for scene in scenes]
    return tuple(
        CaptionedImage(to_picture(to_hwc(draw([scene], PICTURE_EDGE // 2)[0])), caption)
        for scene, caption in zip(scenes, captions, strict=True)
    )
