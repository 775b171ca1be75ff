"""Composed pictures, from what is connected to a node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...concept.errors import DataError
from ...concept.prompts import subject
from ...pictures.sheet import Row, lay_out
from ...pictures.tensors import to_picture, to_tensor
from ...trainer.data.captioned import CaptionedImage
from ...trainer.data.composing import Background, Composed, backgrounds_of, compose, composed_words
from ...trainer.data.folders import load_folder
from ...trainer.data.training_concept import TrainingConcept
from .paths import NO_FOLDER, input_folder

_ON_SHEET = 16
_COLUMNS = 4


@dataclass(frozen=True)
class Made:
    """What the node hands on, and shows."""

    concept: TrainingConcept
    pictures: Tensor
    """(n, h, w, 3)"""
    masks: Tensor
    """(n, h, w)"""
    lines: list[str]
    sheet: Tensor


def compose_pictures(
    concepts: Sequence[TrainingConcept],
    *,
    count: int,
    resolution: int,
    seed: int,
    keep_own: bool,
    background_folder: str,
    places: str,
    backgrounds: Any = None,
    background_set: tuple[CaptionedImage, ...] = (),
) -> Made:
    """The first concept with the composed pictures. Raises DataError and ConfigError as `compose`
    does, and DataError where the lines of `places` are not as many as the connected pictures.
    """
    images = () if backgrounds is None else backgrounds
    everything = [*_connected(images, places)]
    if background_folder != NO_FOLDER:
        everything += backgrounds_of(load_folder(input_folder(background_folder), ""))
    everything += backgrounds_of(background_set)
    made = compose(concepts, everything, count, resolution, seed)
    first, *others = concepts
    own = first.images if keep_own else ()
    lines = [*composed_words(concepts, made)]
    if others:
        names = ", ".join(subject(one.token, one.class_noun) for one in others)
        lines.append(f"Captions name {names} too: connect them to the same Custom Diffusion Train.")
    opened = [image.open() for image in made.pictures]
    return Made(
        replace(first, images=(*own, *made.pictures)),
        torch.stack([to_tensor(one.image) for one in opened]),
        torch.stack([to_tensor(one.mask) for one in opened if one.mask]),
        lines,
        to_tensor(_sheet(made))[None],
    )


def _connected(images: Any, places: str) -> Iterator[Background]:
    said = [line.strip() for line in places.splitlines() if line.strip()]
    if said and len(said) != len(images):
        raise DataError(
            f"{len(said)} places were given for {len(images)} connected backgrounds. Write a line "
            f"for each, or none."
        )
    for image, place in zip(images, said or [""] * len(images), strict=True):
        yield Background(to_picture(image[..., :3]), place)


def _sheet(made: Composed) -> Any:
    """The first composed pictures with their captions."""
    shown = made.pictures[:_ON_SHEET]
    rows = [
        Row("", "", [one.open().image for one in part], [one.caption for one in part])
        for part in (shown[i : i + _COLUMNS] for i in range(0, len(shown), _COLUMNS))
    ]
    return lay_out(rows, tile=192, label=8)
