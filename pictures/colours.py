"""Every mode that a decoder gives, in RGB: shades of 16 bits and fractions are scaled, not cut off.

Pillow itself makes every shade above 255 white, and of a scan whose shades go from 0 to 1 it makes
black.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_WIDE_SHADES = ("I", "F")
_BYTE, _WORD = 255, 65535


def in_colours(image: Image.Image) -> Image.Image:
    """RGBA where a part is transparent, else RGB; itself where it is that already.

    Raises ValueError for colours that cannot be shown, saying which.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in _WIDE_SHADES:
        image = _scaled(image)
    transparent = image.has_transparency_data
    if transparent and image.mode != "RGBA":
        image = image.convert("RGBA")
    if transparent and image.getchannel("A").getextrema() != (_BYTE, _BYTE):
        return image
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """Shades of 0 to 1, to 255 or to 65535, by what the largest is."""
    shades = np.asarray(image)
    low, high = float(shades.min()), float(shades.max())
    if not 0 <= low <= high <= _WORD:  # nor where one is no number
        raise ValueError(
            f"its shades go from {low:g} to {high:g}, and none is known to be white: 1, {_BYTE} or "
            f"{_WORD} would be"
        )
    if high <= 1 and image.mode == "F":
        shades = (shades * _BYTE).round()
    elif high > _BYTE:
        shades = shades / (_BYTE + 2)
    return Image.fromarray(shades.astype(np.uint8))
