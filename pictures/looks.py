"""What a small copy of a picture tells: whether two look the same, and how sharp one is."""

from __future__ import annotations

import numpy as np
from PIL import Image

SAME_BITS = 4
"""Two pictures whose hashes differ in at most so many of 64 bits look nearly the same"""
_HASH_EDGE = 8
_SHARPNESS_EDGE = 512


def difference_hash(picture: Image.Image) -> int:
    """Which of neighbouring shades is the lighter, in a small copy: survives scaling and JPEG."""
    small = _reduced(picture).resize((_HASH_EDGE + 1, _HASH_EDGE), Image.Resampling.BOX)
    shades = np.asarray(small, np.int16)
    return int.from_bytes(np.packbits(shades[:, 1:] > shades[:, :-1]).tobytes(), "big")


def bits_apart(one: int, other: int) -> int:
    """In how many bits two hashes differ."""
    return (one ^ other).bit_count()


def sharpness(picture: Image.Image) -> float:
    """The variance of the Laplacian over that of the shades, at 512 pixels: of pictures of one
    thing, a blurred or enlarged one has a small part of what the others have. 0 for one shade.
    """
    scale = _SHARPNESS_EDGE / min(picture.size)
    size = (max(3, round(picture.width * scale)), max(3, round(picture.height * scale)))
    shades = np.asarray(_reduced(picture).resize(size, Image.Resampling.BICUBIC), np.float32)
    middle = shades[1:-1, 1:-1]
    around = shades[:-2, 1:-1] + shades[2:, 1:-1] + shades[1:-1, :-2] + shades[1:-1, 2:]
    spread = float(shades.var())
    return float((around - 4 * middle).var()) / spread if spread > 0 else 0.0


def _reduced(picture: Image.Image) -> Image.Image:
    """Its shades, at least as large as they are looked at: a photograph is not copied whole."""
    return picture.reduce(max(1, min(picture.size) // (2 * _SHARPNESS_EDGE))).convert("L")
