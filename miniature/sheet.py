"""Pictures in rows, with words beside or below them: what the demo and the docs show."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .concepts import concept_look, concept_pictures, concept_style, to_image
from .drawing import draw
from .model import PICTURE_EDGE
from .world import captioned_scene, random_scene

TILE, GAP, LABEL, CAPTION = 112, 6, 330, 46


@dataclass(frozen=True)
class Row:
    """A row of a sheet: what it is, in which words, and its pictures with their captions."""

    title: str
    words: str
    images: Sequence[Image.Image]
    captions: Sequence[str] = ()


def lay_out(rows: Sequence[Row]) -> Image.Image:
    """All rows below each other, labels on the left."""
    heights = [TILE + GAP + (CAPTION if row.captions else 0) for row in rows]
    width = LABEL + max(len(row.images) for row in rows) * (TILE + GAP)
    sheet = Image.new("RGB", (width, sum(heights) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    title, words, caption = (ImageFont.load_default(size) for size in (17, 13, 11))
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        pen.text((2 * GAP, top + TILE / 2 - 22), row.title, "black", title)
        pen.text((2 * GAP, top + TILE / 2 + 4), row.words, "#555555", words)
        for column, image in enumerate(row.images):
            left = LABEL + column * (TILE + GAP)
            sheet.paste(image.resize((TILE, TILE)), (left, top))
            if row.captions:
                lines = "\n".join(textwrap.wrap(row.captions[column], 21))
                pen.text((left, top + TILE + 2), lines, "#555555", caption, spacing=1)
        top += height
    return sheet


def world_sheet(columns: int = 8) -> Image.Image:
    """Some of the world, two concepts and a style."""
    rng = random.Random("sheet")
    rows = []
    for title in ("The world", ""):
        scenes, captions = zip(*(captioned_scene(rng) for _ in range(columns)), strict=True)
        rows.append(Row(title, "", images(draw(scenes, PICTURE_EDGE)), captions))
    for seed in (0, 1):
        look = concept_look(seed)
        pictures = concept_pictures(look, columns, seed)
        rows.append(Row(f"Concept {seed}", f"<new{seed + 1}> {look.shape}", images(pictures)))
    scenes = tuple(random_scene(rng, style=concept_style(0)) for _ in range(columns))
    rows.append(Row("Style 0", "<new1> art", images(draw(scenes, PICTURE_EDGE))))
    return lay_out(rows)


def images(pictures_bchw: Tensor) -> list[Image.Image]:
    return [to_image(picture) for picture in pictures_bchw]


if __name__ == "__main__":
    world_sheet().save(Path("docs/images/miniature_world.png"), optimize=True)
