"""The paper's random resize: other sizes, the words that say so, and the valid region.

At picture size S, with the frequencies of the reference implementation:

- 27 %: a third to 0.6 of S, pasted on grey at a random place ("very small", "far away");
- 40 %: the centre square as it is;
- 33 %: 1.2 to 1.4 of S, cropped at a random place ("zoomed in", "close up").

The loss counts only where the mask is one, so the grey is never learnt.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .config import LATENT_PIXELS

SMALL_PREFIXES = ("very small", "far away")
LARGE_PREFIXES = ("zoomed in", "close up")
PREFIXES = SMALL_PREFIXES + LARGE_PREFIXES
_SMALL_BELOW = 0.6
_GREY = (128, 128, 128)


@dataclass(frozen=True)
class View:
    """One view of a picture, as it is trained on."""

    image_chw: Tensor
    """(3, S, S) in -1..1"""
    mask: Tensor
    """(S/8, S/8): one where the loss counts"""
    prefix: str
    """Words before the caption, or nothing"""


def whole_view(image: Image.Image, size: int, flip: bool = False) -> View:
    """The centre square of the picture, scaled to (size, size)."""
    square = _centre_square(image, flip).resize((size, size), Image.Resampling.BICUBIC)
    return View(_to_tensor(square), torch.ones(size // LATENT_PIXELS, size // LATENT_PIXELS), "")


def random_view(image: Image.Image, size: int, rng: random.Random, flip: bool = False) -> View:
    """A randomly resized view with its prefix and mask."""
    edge = _random_edge(size, rng)
    if edge > size:
        return _large_view(image, size, edge, rng, flip)
    if edge < _SMALL_BELOW * size:
        return _small_view(image, size, edge, rng, flip)
    return whole_view(image, size, flip)


def _random_edge(size: int, rng: random.Random) -> int:
    if rng.randrange(3) < 2:
        edge = rng.randint(size // 3, size)
    else:
        edge = rng.randint(int(1.2 * size), int(1.4 * size) - 1)
    return edge + edge % 2


def _small_view(image: Image.Image, size: int, edge: int, rng: random.Random, flip: bool) -> View:
    left, top = rng.randint(0, size - edge), rng.randint(0, size - edge)
    small = _centre_square(image, flip).resize((edge, edge), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (size, size), _GREY)
    canvas.paste(small, (left, top))
    mask = torch.zeros(size // LATENT_PIXELS, size // LATENT_PIXELS)
    mask[_inner_cells(top, edge), _inner_cells(left, edge)] = 1
    return View(_to_tensor(canvas), mask, rng.choice(SMALL_PREFIXES))


def _inner_cells(start: int, edge: int) -> slice:
    """Latent cells of the pasted square without its border, which sees the grey; at least one."""
    first = start // LATENT_PIXELS + 1
    return slice(first, max((start + edge) // LATENT_PIXELS - 1, first + 1))


def _large_view(image: Image.Image, size: int, edge: int, rng: random.Random, flip: bool) -> View:
    left, top = rng.randint(0, edge - size), rng.randint(0, edge - size)
    large = _centre_square(image, flip).resize((edge, edge), Image.Resampling.BICUBIC)
    crop = large.crop((left, top, left + size, top + size))
    ones = torch.ones(size // LATENT_PIXELS, size // LATENT_PIXELS)
    return View(_to_tensor(crop), ones, rng.choice(LARGE_PREFIXES))


def _centre_square(image: Image.Image, flip: bool) -> Image.Image:
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    square = image.crop((left, top, left + edge, top + edge))
    return ImageOps.mirror(square) if flip else square


def _to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)
    return pixels / 127.5 - 1
