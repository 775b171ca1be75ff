"""Pictures in rows, with words beside and below them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

_GAP, _LABEL, _CAPTION = 6, 330, 46


@dataclass(frozen=True)
class Row:
    """A row of a sheet: what it is, in which words, and its pictures with their captions."""

    title: str
    words: str
    images: Sequence[Image.Image]
    captions: Sequence[str] = ()


def lay_out(rows: Sequence[Row], tile: int = 112, label: int = _LABEL) -> Image.Image:
    """All rows below each other, labels on the left; a picture is fitted into a square with
    the edge `tile`; `label` is the width of the labels.
    """
    heights = [tile + _GAP + (_CAPTION if row.captions else 0) for row in rows]
    width = label + max(len(row.images) for row in rows) * (tile + _GAP)
    sheet = Image.new("RGB", (width, sum(heights) + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    title, words, caption = (ImageFont.load_default(size) for size in (17, 13, 11))
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        pen.text((2 * _GAP, top + tile / 2 - 22), row.title, "black", title)
        pen.text((2 * _GAP, top + tile / 2 + 4), row.words, "#555555", words)
        for column, image in enumerate(row.images):
            left = label + column * (tile + _GAP)
            sheet.paste(ImageOps.pad(image, (tile, tile), color="white"), (left, top))
            if row.captions:
                lines = "\n".join(textwrap.wrap(row.captions[column], round(tile / 5.3)))
                pen.text((left, top + tile + 2), lines, "#555555", caption, spacing=1)
        top += height
    return sheet
