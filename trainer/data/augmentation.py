"""The paper's random resize: other sizes, the words that say so, and the valid region.

At shorter side S of a view, with the frequencies of the reference implementation:

- 27 %: a third to 0.6 of S, pasted on grey at a random place ("very small", "far away");
- 40 %: the picture as it is;
- 33 %: 1.2 to 1.4 of S, cropped at a random place ("zoomed in", "close up").

What a view shows is the centre of a picture in the view's shape, or all of it between grey bars.
The loss counts only where the mask is above zero: the grey is never learnt, nor what a mask of the
user's leaves out.
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
from .buckets import Frame
from .captioned import GREY, Picture

SMALL_PREFIXES = ("very small", "far away")
LARGE_PREFIXES = ("zoomed in", "close up")
PREFIXES = SMALL_PREFIXES + LARGE_PREFIXES
_SMALL_BELOW = 0.6


@dataclass(frozen=True)
class View:
    """One view of a picture, as it is trained on."""

    image_chw: Tensor
    """(3, h, w) in -1..1"""
    mask: Tensor
    """(h/8, w/8) in 0..1: how much the loss counts"""
    prefix: str
    """Words before the caption, or nothing"""
    sizes: Sizes
    """Where it comes from. A picture that is smaller than the view counts as not cropped."""

    @property
    def frame(self) -> Frame:
        height, width = self.image_chw.shape[1:]
        return width, height


def whole_view(
    picture: Picture, frame: Frame, flip: bool = False, fit: Framing = "buckets"
) -> View:
    """The picture as it is, scaled to a frame. A letterbox is for square ones."""
    return _view(picture, frame, (0, 0, *frame), flip, fit)


def random_view(
    picture: Picture,
    frame: Frame,
    rng: random.Random,
    flip: bool = False,
    fit: Framing = "buckets",
) -> View:
    """A randomly resized view with its prefix and mask."""
    shorter = min(frame)
    edge = _random_edge(shorter, rng)
    (width, height), (x, y) = frame, (edge * side // shorter for side in frame)
    if edge > shorter:
        left, top = -rng.randint(0, x - width), -rng.randint(0, y - height)
        prefix = rng.choice(LARGE_PREFIXES)
    elif edge < _SMALL_BELOW * shorter:
        left, top = rng.randint(0, width - x), rng.randint(0, height - y)
        prefix = rng.choice(SMALL_PREFIXES)
    else:
        return whole_view(picture, frame, flip, fit)
    view = _view(picture, frame, (left, top, x, y), flip, fit, prefix)
    # A close-up may have missed all that a mask lets count.
    return view if view.mask.sum() >= 1 else whole_view(picture, frame, flip, fit)


def _random_edge(size: int, rng: random.Random) -> int:
    """Of a picture whose view has a shorter side of `size`."""
    if rng.randrange(3) < 2:
        edge = rng.randint(size // 3, size)
    else:
        edge = rng.randint(int(1.2 * size), int(1.4 * size) - 1)
    return edge + edge % 2


def _view(
    picture: Picture,
    frame: Frame,
    place: tuple[int, int, int, int],
    flip: bool,
    fit: Framing,
    prefix: str = "",
) -> View:
    """The picture in a rectangle (left, top, width, height) of the frame's shape, which may be
    smaller or larger than the frame.
    """
    left, top, width, height = place
    image, mask = picture.image, picture.mask
    cut_x = cut_y = 0  # of the picture at the size it is seen
    if fit == "letterbox":
        edge = width
        width, height = (max(round(edge * side / max(image.size)), 1) for side in image.size)
        left, top = left + (edge - width) // 2, top + (edge - height) // 2
    else:
        x, y, seen = _middle(image.size, frame)
        box = (x, y, x + seen[0], y + seen[1])
        image, mask = image.crop(box), mask and mask.crop(box)
        cut_x, cut_y = x * width // seen[0], y * height // seen[1]
    if flip:
        image, mask = ImageOps.mirror(image), mask and ImageOps.mirror(mask)

    canvas = Image.new("RGB", frame, GREY)
    canvas.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
    across, down = frame
    counts = torch.zeros(down // LATENT_PIXELS, across // LATENT_PIXELS)
    counts[_inner_cells(top, height, down), _inner_cells(left, width, across)] = 1
    if mask:
        shades = Image.new("L", frame)
        shades.paste(mask.resize((width, height), Image.Resampling.BILINEAR), (left, top))
        counts *= functional.avg_pool2d(to_tensor(shades)[None], LATENT_PIXELS)[0]
    whole = place[2] >= across
    crop = (max(cut_y - top, 0), max(cut_x - left, 0)) if whole else (0, 0)
    sizes = (picture.image.height, picture.image.width, *crop, down, across)
    return View(for_network(canvas), counts, prefix, sizes)


def _middle(size: Frame, frame: Frame) -> tuple[int, int, Frame]:
    """Left, top and size of the largest part of a picture that has a frame's shape."""
    (width, height), (across, down) = size, frame
    if width * down > height * across:
        seen = max(height * across // down, 1), height
    else:
        seen = width, max(width * down // across, 1)
    return (width - seen[0]) // 2, (height - seen[1]) // 2, seen


def _inner_cells(start: int, edge: int, size: int) -> slice:
    """Latent cells of what was pasted, without those that see the grey beside it; at least one.
    Along one side of a view, `size` pixels long.
    """
    if start <= 0 and start + edge >= size:
        return slice(0, size // LATENT_PIXELS)
    first = max(start // LATENT_PIXELS + 1, 0)
    return slice(first, max((start + edge) // LATENT_PIXELS - 1, first + 1))
