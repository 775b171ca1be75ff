"""What a run is about to be trained on, as a picture: the views, their prompts and their masks."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image, ImageOps

from ...diffusion.latents import LATENT_PIXELS
from ...pictures.sheet import Row, lay_out
from ..config import TrainConfig
from .augmentation import View
from .captioned import CaptionedImage
from .latents import instance_views, regularization_view, views_per_image
from .training_concept import TrainingConcept

_COLUMNS, _GIVEN_COLUMNS, _TILE = 8, 4, 160
_REGULARIZATION = 2
"""Rows of regularization images that are shown."""
_DIMMED = 0.25
"""Brightness of what does not count"""


def contact_sheet(concept: TrainingConcept, config: TrainConfig) -> Image.Image:
    """The first views of every image of a run, just as they will be encoded.

    What the loss does not see is dark. Raises DataError as the run itself would.
    """
    views = instance_views(concept, config)
    rows = []
    for captioned in concept.images:
        own = [next(views) for _ in range(views_per_image(config))]
        words = f"{len(own)} views"
        if captioned.repeats > 1:
            words += f", {captioned.repeats} times as often"
        rows.append(_row(captioned.name, words, own[:_COLUMNS]))
    shown = concept.regularization[: _REGULARIZATION * _COLUMNS]
    for start in range(0, len(shown), _COLUMNS):
        images = shown[start : start + _COLUMNS]
        pairs = [(image.caption, regularization_view(image, config)) for image in images]
        words = f"{len(shown)} of {len(concept.regularization)}"
        rows.append(_row("Regularization", words, pairs))
    return lay_out(rows, _TILE)


def picture_sheet(concept: TrainingConcept) -> Image.Image:
    """Every instance image as it was given, with its caption; what does not count is dark."""
    rows = []
    for start in range(0, len(concept.images), _GIVEN_COLUMNS):
        shown = concept.images[start : start + _GIVEN_COLUMNS]
        pictures = [_fitted(captioned) for captioned in shown]
        rows.append(Row("", "", pictures, [captioned.caption for captioned in shown]))
    return lay_out(rows, _TILE, label=0)


def _fitted(captioned: CaptionedImage) -> Image.Image:
    """All of a picture in a square."""
    picture = captioned.open()
    image = picture.image
    if picture.mask:
        dark = image.point(lambda shade: round(shade * _DIMMED))
        image = Image.composite(image, dark, picture.mask)
    return ImageOps.pad(image, (_TILE, _TILE), color="white")


def _row(title: str, words: str, views: Iterable[tuple[str, View]]) -> Row:
    prompts, pictures = zip(*((prompt, _shown(view)) for prompt, view in views), strict=True)
    return Row(title, words, pictures, prompts)


def _shown(view: View) -> Image.Image:
    pixels = view.mask.repeat_interleave(LATENT_PIXELS, 0).repeat_interleave(LATENT_PIXELS, 1)
    brightness = _DIMMED + (1 - _DIMMED) * pixels
    image_hwc = ((view.image_chw / 2 + 0.5) * brightness).permute(1, 2, 0)
    return Image.fromarray((image_hwc * 255).round().byte().numpy())
