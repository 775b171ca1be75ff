"""What each picture of a concept counts, beside how often it comes up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ...concept.errors import DataError
from .captioned import CaptionedImage


def with_weights(images: Sequence[CaptionedImage], text: str) -> tuple[CaptionedImage, ...]:
    """The pictures with weights that a user has written: one number for each, in their order, or
    lines that name pictures, `cat1.jpg: 2`; the others keep theirs. Pictures without a file are
    named by their number, from 1 on.

    Raises DataError for what is no number of 0 or more, and for a name or a count that does not
    fit.
    """
    if not text.strip():
        return tuple(images)
    if ":" not in text:
        numbers = [_number(word, text) for word in text.replace(",", " ").split()]
        if len(numbers) != len(images):
            raise DataError(
                f"{len(numbers)} picture weights were given for {len(images)} pictures. Give one "
                f"for each, or lines with names: 'cat1.jpg: 2'."
            )
        return _weighted(images, dict(enumerate(numbers)))
    places = {image.file_name or str(n): n - 1 for n, image in enumerate(images, start=1)}
    found: dict[int, float] = {}
    for line in filter(str.strip, text.replace(",", "\n").splitlines()):
        name, _, number = line.rpartition(":")
        if name.strip() not in places:
            raise DataError(
                f"A weight was given for {name.strip()!r}, and no picture is called so. The "
                f"pictures are {', '.join(list(places)[:8])}."
            )
        found[places[name.strip()]] = _number(number, line)
    return _weighted(images, found)


def _weighted(
    images: Sequence[CaptionedImage], weights: dict[int, float]
) -> tuple[CaptionedImage, ...]:
    return tuple(
        replace(image, weight=weights.get(place, image.weight))
        for place, image in enumerate(images)
    )


def _number(word: str, text: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise DataError(
            f"{word.strip()!r} in the picture weights {text.strip()[:80]!r} is no number of 0 or "
            f"more. Write 1 for a picture that counts as usual, 2 for one that counts twice."
        )
    return number
