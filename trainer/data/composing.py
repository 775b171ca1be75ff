"""Composed pictures: subjects cut out by their masks and pasted beside each other onto backgrounds,
with captions and masks, in the spirit of Gen4Gen (Yeh et al. 2024). What has no mask is left out.

Where each lies is drawn, without a language model: side by side, none over another.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image, ImageOps

from ...concept.errors import ConfigError, DataError
from ...concept.prompts import DEFAULT_TEMPLATE, STYLE_TEMPLATE, subject
from .captioned import CaptionedImage, open_each
from .training_concept import TrainingConcept

T = TypeVar("T")
MOST_COMPOSED = 1000
_LARGEST, _SMALLEST = 0.95, 0.65
"""Edge of a subject in its part of the picture"""
_TALLEST = 0.8
"""Height of a subject in the picture"""
_GROUND = 0.75
"""From where on downwards subjects stand"""


@dataclass(frozen=True)
class Background:
    """What subjects are pasted onto."""

    image: Image.Image
    place: str = ""
    """What the caption says of it, `on a beach`"""


def backgrounds_of(images: Sequence[CaptionedImage]) -> list[Background]:
    """Captioned pictures as backgrounds: of `photo of a beach` captions say `a beach`."""
    return [
        Background(picture.image, images[place].caption.removeprefix("photo of ").strip(" ,."))
        for place, picture in open_each(images)
    ]


@dataclass(frozen=True)
class Composed:
    """What was made, and of what."""

    pictures: tuple[CaptionedImage, ...]
    cut_outs: tuple[int, ...]
    """Of each concept: pictures that it was cut out of"""
    unmasked: tuple[int, ...]
    """Of each concept: pictures that were left out, because they have no mask"""
    backgrounds: int


def compose(
    concepts: Sequence[TrainingConcept],
    backgrounds: Sequence[Background],
    count: int,
    edge: int,
    seed: int,
) -> Composed:
    """`count` square pictures with the edge `edge`, each with one subject of every concept. Their
    masks are white where a subject is. The same inputs and seed give the same pictures.

    Raises DataError for a style, which has no outline, for a concept without a mask, and where
    there is no background; ConfigError for a count or an edge that cannot be.
    """
    if not 1 <= count <= MOST_COMPOSED or edge < 64:
        raise ConfigError(
            f"{count} pictures of {edge} pixels were asked for. Ask for 1 to {MOST_COMPOSED}, of "
            f"64 pixels or more."
        )
    if not backgrounds:
        raise DataError(
            "There is no background to paste onto. Give pictures of places without the subjects: "
            "your own, or some that the model has drawn."
        )
    cut_outs = [_cut_outs(concept, edge) for concept in concepts]
    pictures = tuple(
        _composed(
            concepts,
            cut_outs,
            _in_turn(backgrounds, number, f"{seed} background"),
            edge,
            number,
            seed,
        )
        for number in range(count)
    )
    used = tuple(map(len, cut_outs))
    unmasked = tuple(len(c.images) - n for c, n in zip(concepts, used, strict=True))
    return Composed(pictures, used, unmasked, len(backgrounds))


def composed_words(concepts: Sequence[TrainingConcept], made: Composed) -> Iterator[str]:
    """What was made, and what was left out, a sentence each."""
    names = [subject(one.token, one.class_noun) for one in concepts]
    parts = ", ".join(
        f"{_counted(count, 'cut-out')} of {name}"
        for name, count in zip(names, made.cut_outs, strict=True)
    )
    made_of = f"{parts}, on {_counted(made.backgrounds, 'background')}"
    yield f"{_counted(len(made.pictures), 'picture')} of {made_of}."
    for name, count in zip(names, made.unmasked, strict=True):
        if count:
            yield f"Left out because of no mask: {_counted(count, 'picture')} of {name}."


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _cut_outs(concept: TrainingConcept, edge: int) -> list[Image.Image]:
    """Each masked picture as far as its mask reaches, RGBA, no longer edge than `edge`."""
    name = subject(concept.token, concept.class_noun)
    if concept.template == STYLE_TEMPLATE:
        raise DataError(
            f"{name} is a style, and a style has no outline to cut out. Compose things only."
        )
    found = []
    for _, picture in open_each(concept.images):
        if picture.mask is None:
            continue
        cut_out = picture.image.copy()
        cut_out.putalpha(picture.mask)
        cut_out = cut_out.crop(picture.mask.getbbox())
        cut_out.thumbnail((edge, edge), Image.Resampling.LANCZOS)
        found.append(cut_out)
    if not found:
        raise DataError(
            f"None of the {len(concept.images)} pictures of {name} has a mask, so it cannot be cut "
            f"out. Connect masks, or put cat1.mask.png, white where the subject is, next to "
            f"cat1.jpg."
        )
    return found


def _composed(
    concepts: Sequence[TrainingConcept],
    cut_outs: Sequence[Sequence[Image.Image]],
    background: Background,
    edge: int,
    number: int,
    seed: int,
) -> CaptionedImage:
    chance = random.Random(f"{seed} {number}")
    order = chance.sample(range(len(concepts)), len(concepts))
    canvas = _square(background.image, edge, chance)
    mask = Image.new("L", (edge, edge))
    for part, which in enumerate(order):
        cut_out = _in_turn(cut_outs[which], number, f"{seed} subject {which}")
        pasted, place = _placed(
            cut_out, part * edge // len(order), edge // len(order), edge, chance
        )
        canvas.paste(pasted, place, pasted)
        mask.paste(pasted.getchannel("A"), place)
    names = [subject(concepts[which].token, concepts[which].class_noun) for which in order]
    caption = DEFAULT_TEMPLATE.format(" and a ".join(names))
    if background.place:
        caption = f"{caption}, {background.place}"
    return CaptionedImage(canvas, caption, mask)


def _placed(
    cut_out: Image.Image, left: int, width: int, edge: int, chance: random.Random
) -> tuple[Image.Image, tuple[int, int]]:
    """A subject in the size that it has in its part of the picture, and where."""
    share = chance.uniform(_SMALLEST, _LARGEST)
    scale = share * min(width / cut_out.width, _TALLEST * edge / cut_out.height)
    size = (max(1, int(cut_out.width * scale)), max(1, int(cut_out.height * scale)))
    bottom = int(edge * chance.uniform(max(_GROUND, size[1] / edge), 1))
    across = left + int(chance.uniform(0, width - size[0]))
    return cut_out.resize(size, Image.Resampling.LANCZOS), (across, bottom - size[1])


def _square(image: Image.Image, edge: int, chance: random.Random) -> Image.Image:
    """A square part of a background, as large as it has one."""
    centre = (chance.random(), chance.random())
    return ImageOps.fit(image.convert("RGB"), (edge, edge), Image.Resampling.LANCZOS, 0, centre)


def _in_turn(items: Sequence[T], number: int, seed: str) -> T:
    """Each once before any comes again, every time around in another order."""
    around, place = divmod(number, len(items))
    order = random.Random(f"{seed}, {around}").sample(range(len(items)), len(items))
    return items[order[place]]
