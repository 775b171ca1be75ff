"""The thumbnails of the shipped workflows, cut out of what the demo drew: the miniature, taught and
merged in the same way. Nobody's photographs are in them, and they claim nothing of larger models.

`python -m custom_diffusion.miniature.thumbnails` writes them. Where the demo does nothing of a
workflow's kind, the thumbnail is a picture of its graph.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..pictures.opening import read_picture

_ROOT = Path(__file__).resolve().parents[1]
_TILE, _LEFT, _TOP, _STEP = 112, 330, 6, 118
"""Where `pictures/sheet.py` puts a tile"""
_SMALL, _LARGE, _GAP = 160, 492, 6
Place = tuple[int, int]
"""Row and column of the demo's sheet"""
GIVEN_1 = [(0, 1), (0, 2), (0, 4)]
GIVEN_2 = [(1, 1), (1, 2), (1, 4)]
DRAWN_1 = [(3, 0), (3, 3), (3, 4)]
DRAWN_2 = [(4, 2), (4, 3), (4, 4)]
PAGES: dict[int, tuple[list[list[Place]], Place]] = {
    1: ([GIVEN_1], (3, 0)),
    2: ([GIVEN_2], (4, 2)),
    3: ([[(2, 0), (2, 1), (2, 2)]], (3, 5)),
    4: ([DRAWN_1, DRAWN_2], (5, 2)),
    5: ([DRAWN_1, DRAWN_2], (6, 4)),
    6: ([GIVEN_1, GIVEN_2], (6, 0)),
    9: ([[(2, 3), (2, 4), (2, 5)]], (4, 3)),
}
"""Number of a workflow → small pictures in columns, and the result"""


def write_thumbnails(folder: Path = _ROOT / "example_workflows") -> None:
    sheet = read_picture(_ROOT / "docs" / "images" / "demo.png").convert("RGB")
    for number, (columns, result) in PAGES.items():
        (workflow,) = folder.glob(f"{number} *.json")
        page = _page(sheet, columns, result)
        page.save(workflow.with_suffix(".jpg"), quality=88, optimize=True)


def _page(sheet: Image.Image, columns: list[list[Place]], result: Place) -> Image.Image:
    left = len(columns) * (_SMALL + _GAP)
    page = Image.new("RGB", (left + _LARGE, _LARGE), "white")
    for column, places in enumerate(columns):
        for row, place in enumerate(places):
            corner = (column * (_SMALL + _GAP), row * (_SMALL + _GAP))
            page.paste(_tile(sheet, place, _SMALL), corner)
    page.paste(_tile(sheet, result, _LARGE), (left, 0))
    return page


def _tile(sheet: Image.Image, place: Place, edge: int) -> Image.Image:
    top, left = _TOP + _STEP * place[0], _LEFT + _STEP * place[1]
    tile = sheet.crop((left, top, left + _TILE, top + _TILE))
    return tile.resize((edge, edge), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    write_thumbnails()
