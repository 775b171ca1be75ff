"""The paper's random resize: other sizes, the words that say so, and the valid region.

At picture size S, with the frequencies of the reference implementation:

- 27 %: a third to 0.6 of S, pasted on grey at a random place ("very small", "far away");
- 40 %: the square as it is;
- 33 %: 1.2 to 1.4 of S, cropped at a random place ("zoomed in", "close up").

The square is the centre of a picture, or all of it between grey bars. The loss counts only where
the mask is above zero: the grey is never learnt, nor what a mask of the user's leaves out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from ...diffusion.latents import LATENT_PIXELS
from ...diffusion.protocols import Sizes
from ...pictures.tensors import for_network, to_tensor
from ..config import Framing
from .captioned import GREY, Picture

SMALL_PREFIXES = ("very small", "far away")
LARGE_PREFIXES = ("zoomed in", "close up")
PREFIXES = SMALL_PREFIXES + LARGE_PREFIXES
_SMALL_BELOW = 0.6


@dataclass(frozen=True)
class View:
    """One view of a picture, as it is trained on."""

    image_chw: Tensor
    """(3, S, S) in -1..1"""
    mask: Tensor
    """(S/8, S/8) in 0..1: how much the loss counts"""
    prefix: str
    """Words before the caption, or nothing"""
    sizes: Sizes
    """Where it comes from. A picture that is smaller than the view counts as not cropped."""


def whole_view(picture: Picture, size: int, flip: bool = False, fit: Framing = "crop") -> View:
    """The picture as it is, scaled to (size, size)."""
    return _view(picture, size, (0, 0, size), flip, fit)


def random_view(
    picture: Picture, size: int, rng: random.Random, flip: bool = False, fit: Framing = "crop"
) -> View:
    """A randomly resized view with its prefix and mask."""
    edge = _random_edge(size, rng)
    if edge > size:
        left, top = -rng.randint(0, edge - size), -rng.randint(0, edge - size)
        prefix = rng.choice(LARGE_PREFIXES)
    elif edge < _SMALL_BELOW * size:
        left, top = rng.randint(0, size - edge), rng.randint(0, size - edge)
        prefix = rng.choice(SMALL_PREFIXES)
    else:
        return whole_view(picture, size, flip, fit)
    view = _view(picture, size, (left, top, edge), flip, fit, prefix)
    # A close-up may have missed all that a mask lets count.
    return view if view.mask.sum() >= 1 else whole_view(picture, size, flip, fit)


def _random_edge(size: int, rng: random.Random) -> int:
    if rng.randrange(3) < 2:
        edge = rng.randint(size // 3, size)
    else:
        edge = rng.randint(int(1.2 * size), int(1.4 * size) - 1)
    return edge + edge % 2


def _view(
    picture: Picture,
    size: int,
    square: tuple[int, int, int],
    flip: bool,
    fit: Framing,
    prefix: str = "",
) -> View:
    """The picture in a square (left, top, edge) that may be smaller or larger than the view."""
    left, top, edge = square
    image, mask = picture.image, picture.mask
    width, height = image.size
    cut_x = cut_y = 0  # of the picture at the size it is seen
    if fit == "crop":
        shorter = min(image.size)
        x, y = (width - shorter) // 2, (height - shorter) // 2
        box = (x, y, x + shorter, y + shorter)
        image, mask = image.crop(box), mask and mask.crop(box)
        width = height = edge
        cut_x, cut_y = x * edge // shorter, y * edge // shorter
    else:
        width, height = (max(round(edge * side / max(image.size)), 1) for side in image.size)
        left, top = left + (edge - width) // 2, top + (edge - height) // 2
    if flip:
        image, mask = ImageOps.mirror(image), mask and ImageOps.mirror(mask)

    canvas = Image.new("RGB", (size, size), GREY)
    canvas.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
    counts = torch.zeros(size // LATENT_PIXELS, size // LATENT_PIXELS)
    counts[_inner_cells(top, height, size), _inner_cells(left, width, size)] = 1
    if mask:
        shades = Image.new("L", (size, size))
        shades.paste(mask.resize((width, height), Image.Resampling.BILINEAR), (left, top))
        counts *= functional.avg_pool2d(to_tensor(shades)[None], LATENT_PIXELS)[0]
    crop = (max(cut_y - top, 0), max(cut_x - left, 0)) if edge >= size else (0, 0)
    sizes = (picture.image.height, picture.image.width, *crop, size, size)
    return View(for_network(canvas), counts, prefix, sizes)


def _inner_cells(start: int, edge: int, size: int) -> slice:
    """Latent cells of what was pasted, without those that see the grey beside it; at least one."""
    if start <= 0 and start + edge >= size:
        return slice(0, size // LATENT_PIXELS)
    first = max(start // LATENT_PIXELS + 1, 0)
    return slice(first, max((start + edge) // LATENT_PIXELS - 1, first + 1))
