"""What a run is about to be trained on, as a picture: the views, their prompts and their masks."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice

from PIL import Image, ImageOps

from ...diffusion.latents import LATENT_PIXELS
from ...pictures.sheet import Row, lay_out
from ...pictures.tensors import of_network, to_picture
from ..config import TrainConfig
from .augmentation import View
from .captioned import Picture
from .latents import (
    frames_of,
    instance_views,
    regularization_frames,
    regularization_view,
    views_per_image,
)
from .mixing import mixable, mixed_views
from .training_concept import TrainingConcept

_COLUMNS, _GIVEN_COLUMNS, _TILE = 8, 4, 160
_REGULARIZATION = 2
"""Rows of regularization images that are shown."""
_MOST_ROWS = 32
"""Of instance images: a taller sheet fills the memory, and no screen."""
_DIMMED = 0.25
"""Brightness of what does not count"""


def contact_sheet(
    concept: TrainingConcept, config: TrainConfig, together: TrainingConcept | None = None
) -> Image.Image:
    """The first views of every image of a run, just as they will be encoded; where its settings mix
    concepts also the first of those beside the one that is trained `together` with it.

    What the loss does not see is dark. Raises DataError as the run itself would, for the pictures
    that are shown.
    """
    pictures = concept.images[:_MOST_ROWS]
    count = views_per_image(config, len(concept.images))
    views = instance_views(pictures, count, config)
    rows = []
    frames = [frames_of(captioned.size(), config) for captioned in concept.images]
    shown = [(one, frame) for one, each in zip(pictures, frames, strict=False) for frame in each]
    for captioned, (width, height) in shown:
        words = f"{count} views of {width} x {height}"
        if captioned.repeats > 1:
            words += f", {captioned.repeats} times as often"
        rows.append(_row(captioned.name, words, islice(views, min(count, _COLUMNS))))
        for _ in range(_COLUMNS, count):
            next(views)
    if more := len(concept.images) - len(pictures):
        rows.append(Row(f"{more} more pictures", "are not shown", ()))
    if together and config.seg_mix:
        mixable([concept, together], config)
        seen = mixed_views(concept, together, config, _COLUMNS, sorted({*chain(*frames)}))
        words = f"in {config.seg_mix:.0%} of its views"
        rows.append(
            _row(f"Beside {together.subject}", words, ((one.prompt, one.view) for one in seen))
        )
    guards = regularization_frames(concept, frames, config)
    first = guards[: _REGULARIZATION * _COLUMNS]
    for start in range(0, len(first), _COLUMNS):
        pairs = (
            (image.caption, regularization_view(image, frame, config))
            for image, frame in first[start : start + _COLUMNS]
        )
        words = f"{len(first)} of {len(guards)}"
        rows.append(_row("Regularization", words, pairs))
    return lay_out(rows, _TILE)


class PictureSheet:
    """Every instance image as it was given, with its caption; what does not count is dark. It takes
    them as somebody else opens them, one after the other.
    """

    def __init__(self, concept: TrainingConcept) -> None:
        self._images = concept.images
        self._tiles: dict[int, Image.Image] = {}

    def add(self, place: int, picture: Picture) -> None:
        if place < _MOST_ROWS * _GIVEN_COLUMNS:
            self._tiles[place] = _fitted(picture)

    def draw(self) -> Image.Image:
        places = sorted(self._tiles)
        rows = []
        for start in range(0, len(places), _GIVEN_COLUMNS):
            shown = places[start : start + _GIVEN_COLUMNS]
            captions = [self._images[place].caption for place in shown]
            rows.append(Row("", "", [self._tiles[place] for place in shown], captions))
        if more := len(self._images) - len(places):
            rows.append(Row(f"{more} more pictures", "are not shown", ()))
        return lay_out(rows, _TILE, label=0)


def _fitted(picture: Picture) -> Image.Image:
    """All of a picture in a square."""
    image = picture.image
    if picture.mask:
        dark = image.point(lambda shade: round(shade * _DIMMED))
        image = Image.composite(image, dark, picture.mask)
    return ImageOps.pad(image, (_TILE, _TILE), color="white")


def _row(title: str, words: str, views: Iterable[tuple[str, View]]) -> Row:
    square = (_TILE, _TILE)
    tiles = [(prompt, ImageOps.contain(_shown(view), square)) for prompt, view in views]
    return Row(title, words, [tile for _, tile in tiles], [prompt for prompt, _ in tiles])


def _shown(view: View) -> Image.Image:
    pixels = view.mask.repeat_interleave(LATENT_PIXELS, 0).repeat_interleave(LATENT_PIXELS, 1)
    brightness = _DIMMED + (1 - _DIMMED) * pixels
    return to_picture(of_network(view.image_chw) * brightness[:, :, None])
