"""A picture of the miniature world, for the docs."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..pictures.sheet import Row, lay_out
from ..pictures.tensors import channels_last, to_picture
from .concepts import concept_look, concept_pictures, concept_style
from .drawing import draw
from .model import PICTURE_EDGE
from .world import captioned_scene, random_scene


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
    return [*map(to_picture, channels_last(pictures_bchw))]


if __name__ == "__main__":
    world_sheet().save(Path("docs/images/miniature_world.png"), optimize=True)
