"""The thumbnails of the shipped workflows: what the miniature draws when it is taught and merged in
the same way. Nobody's photographs are in them, and they claim nothing of larger models.

`python -m custom_diffusion.miniature.thumbnails` writes them; it takes some minutes. A style with a
subject is more than the miniature draws: that workflow has a picture of its graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from ..concept.concept import Concept
from ..merge.merging import merge_concepts
from .composition import Taught, Way, ways
from .composition import draw as draw_composed
from .laboratory import Laboratory, pair_of_subjects
from .model import CONFIG
from .world import class_caption, world_captions
from .world_sheet import images

WORKFLOWS = Path(__file__).resolve().parents[1] / "example_workflows"
PAIR = 50
COMPOSED_PAIR = 500
"""Of what is drawn in places"""
_SMALL, _LARGE, _GAP = 160, 492, 6


def write_thumbnails(folder: Path = WORKFLOWS) -> None:
    """Of the workflows with these numbers."""
    lab = Laboratory()
    pair = pair_of_subjects(PAIR, seed=0)
    one, two = pair
    alone = [lab.teach([each], CONFIG) for each in pair]
    together = lab.teach(pair, replace(CONFIG, steps=2 * CONFIG.steps))
    merged, _ = merge_concepts(alone, lab.encoder, captions=world_captions())

    def drawn(prompt: str, concept: Concept | None = None, routed: Sequence[Concept] = ()) -> Tiles:
        return images(lab.draw([prompt] * 6, concept, 0, routed=routed))

    both = f"photo of a {one.words} and a {two.words}"
    given = [[image.open().image for image in each.training.images] for each in pair]
    mine = [
        drawn(f"photo of a {each.words}", concept)
        for each, concept in zip(pair, alone, strict=True)
    ]
    plain = drawn(class_caption(one.look.shape))
    night = drawn(f"photo of a {one.words} at night", alone[0])
    pages = {
        1: ([given[0][:3]], mine[0][0]),
        2: ([given[1][:3]], mine[1][3]),
        3: ([plain[:3]], mine[0][4]),
        4: ([mine[0][:3], mine[1][:3]], drawn(both, None, alone)[0]),
        5: ([mine[0][:3], mine[1][:3]], drawn(both, merged)[2]),
        6: ([given[0][:3], given[1][:3]], drawn(both, merged)[0]),
        7: ([given[0][:3], given[1][:3]], drawn(both, together)[0]),
        9: ([plain[:3]], night[0]),
    }
    _save(pages, folder)


def write_composed_thumbnails(folder: Path = WORKFLOWS, kept: Path | None = None) -> None:
    """Of the workflows with regions; `kept` is a folder for what is taught on the way."""
    lab = Laboratory()
    taught = Taught(lab, kept, COMPOSED_PAIR, seed=0)
    pages = {}
    for number, one_shape, name in ((10, False, "regions, given"), (11, True, "isolated, given")):
        pair, apart = taught.pair(one_shape), taught.apart(one_shape)
        given = [[image.open().image for image in one.training.images] for one in pair]
        prompts = [f"photo of a {pair[0].words} to the left of a {pair[1].words}"] * 6
        way: Way = ways(apart, None, lab)[name](prompts)
        drawn = images(draw_composed(lab, prompts, way, seed=0)[0])
        pages[number] = [given[0][:3], given[1][:3]], drawn[_BEST[number]]
    _save(pages, folder)


Tiles = list[Image.Image]
_BEST = {10: 4, 11: 5}
"""Which of six"""


def _save(pages: Mapping[int, tuple[Sequence[Tiles], Image.Image]], folder: Path) -> None:
    for number, (columns, large) in pages.items():
        (workflow,) = folder.glob(f"{number} *.json")
        _page(columns, large).save(workflow.with_suffix(".jpg"), quality=88, optimize=True)


def _page(columns: Sequence[Tiles], large: Image.Image) -> Image.Image:
    """Small pictures in columns of three, and the result beside them."""
    left = len(columns) * (_SMALL + _GAP)
    page = Image.new("RGB", (left + _LARGE, _LARGE), "white")
    for column, tiles in enumerate(columns):
        for row, tile in enumerate(tiles):
            small = tile.resize((_SMALL, _SMALL), Image.Resampling.LANCZOS)
            page.paste(small, (column * (_SMALL + _GAP), row * (_SMALL + _GAP)))
    page.paste(large.resize((_LARGE, _LARGE), Image.Resampling.LANCZOS), (left, 0))
    return page


if __name__ == "__main__":
    write_thumbnails()
    write_composed_thumbnails()
