"""What is not wrong with the pictures of a concept, but makes it learn worse than it could."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ...pictures.looks import SAME_BITS, bits_apart, difference_hash, sharpness
from .buckets import LONGEST
from .captioned import Picture, open_each
from .folders import some
from .training_concept import TrainingConcept

FEWEST, MOST = 4, 20
"""Pictures that the paper calls enough"""
SMALL_PIXELS = 256
BLURRED = 0.05
"""Share of the middle sharpness below which a picture is called blurred: backgrounds alone make
pictures of one thing differ several times
"""
_MOST_TOKENS = 75
"""That CLIP reads at once, besides the start and the end"""
_PIECES = re.compile(r"[^\W\d_]+|\d|[^\w\s]+|_+")
"""CLIP splits a text at least so far: words, digits, and signs."""
_SYNTAX = re.compile(r"\([^()]*:\s*-?[\d.]+\s*\)|\{[^{}]*\|[^{}]*\}|<lora:[^>]*>|__[\w/-]+__")
"""What prompts weight, choose from and load: for a training it is words like others"""


def advice(
    concept: TrainingConcept, on_picture: Callable[[int, Picture], None] = lambda *opened: None
) -> Iterator[str]:
    """One sentence for each thing that a user may want to mend. Opens every instance image, once,
    and hands it to `on_picture` too; raises one DataError that names all that cannot be read.
    """
    count = len(concept.images)
    if count < FEWEST:
        yield f"{count} pictures are few: {FEWEST} to {MOST} teach a concept well."
    names = [
        image.source.name if isinstance(image.source, Path) else f"picture {number}"
        for number, image in enumerate(concept.images, start=1)
    ]
    small: list[str] = []
    long: list[str] = []
    alike: list[str] = []
    looks: dict[int, str] = {}
    sharp: dict[str, float] = {}
    for place, opened in open_each(concept.images):
        on_picture(place, opened)
        name, picture = names[place], opened.image
        if min(picture.size) < SMALL_PIXELS:
            small.append(f"{name} ({picture.width} x {picture.height} pixels)")
        if max(picture.size) > LONGEST * min(picture.size):
            long.append(f"{name} ({picture.width} x {picture.height} pixels)")
        sharp[name] = sharpness(picture)
        look = difference_hash(picture)
        near = min(looks, key=lambda other: bits_apart(look, other), default=None)
        if near is not None and bits_apart(look, near) <= SAME_BITS:
            nearly = "" if near == look else "nearly "
            alike.append(f"{name} looks {nearly}the same as {looks[near]}: it counts twice.")
        looks.setdefault(look, name)
        del opened, picture  # before the next one is decoded
    if small:
        yield f"Small, so it is enlarged, and its blur is learnt: {some(small)}."
    if long:
        yield f"So long that only the middle is learnt; crop it to what counts: {some(long)}."
    if blurred := _blurred(sharp):
        yield f"Blurred next to the others, and blur is learnt: {some(blurred)}."
    yield from alike
    if unused := [n for n, image in zip(names, concept.images, strict=True) if not image.weight]:
        yield f"With the weight 0, so not learnt from: {some(unused)}."
    pairs = list(zip(names, concept.images, strict=True))
    if added := [name for name, image in pairs if image.trigger_added]:
        example = next(image.caption for _, image in pairs if image.trigger_added)
        yield f"The trigger word was put into captions without it: {some(added)} ({example!r})."
    plain = [
        name
        for name, image in zip(names, concept.images, strict=True)
        if image.caption == concept.prompt
    ]
    yield from _caption_advice(names, concept)
    if 0 < len(plain) < count:
        yield f"Without a caption of their own: {some(plain)}. They get '{concept.prompt}'."
    if not concept.token and not concept.regularization:
        yield (
            f"There is no trigger word, so {concept.class_noun!r} itself is taught, and there "
            f"are no regularization pictures: the model may draw every {concept.class_noun} like "
            f"this one."
        )


def _caption_advice(names: list[str], concept: TrainingConcept) -> Iterator[str]:
    """Of captions that no model reads as they are meant."""
    long, prompts = [], []
    named = [*zip(names, concept.images, strict=True)]
    named += [(image.name, image) for image in concept.regularization]
    for name, image in named:
        words = image.caption.replace(concept.token, "x") if concept.token else image.caption
        if len(_PIECES.findall(words)) > _MOST_TOKENS:
            long.append(name)
        if found := _SYNTAX.search(image.caption):
            prompts.append(f"{found[0]!r} ({name})")
    if long:
        yield (
            f"CLIP reads {_MOST_TOKENS} tokens at once, so a longer caption is read in parts, as "
            f"ComfyUI does: {some(long)}. Shorter ones are learnt better."
        )
    if prompts:
        yield f"Captions have no weights or choices; this is learnt as it stands: {some(prompts)}."


def _blurred(sharp: Mapping[str, float]) -> list[str]:
    """Names of pictures that are much less sharp than the middle one; of two nobody knows which."""
    if len(sharp) < FEWEST - 1:
        return []
    least = BLURRED * statistics.median(sharp.values())
    return [name for name, value in sharp.items() if value < least]
