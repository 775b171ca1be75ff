"""The thumbnails of the shipped workflows: what the miniature draws when it is taught and merged in
the same way. Nobody's photographs are in them, and no result of a larger model is claimed.

`python -m custom_diffusion.miniature.thumbnails` writes them; it takes some minutes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..concept.concept import Concept
from ..concept.prompts import STYLE_TEMPLATE
from ..merge.merging import merge_concepts
from ..pictures.tensors import to_hwc, to_picture
from ..trainer.config import TrainConfig
from ..trainer.data.captioned import CaptionedImage
from ..trainer.data.training_concept import TrainingConcept, instance_caption
from .concepts import INSTANCE_IMAGES, concept_style
from .drawing import draw
from .laboratory import Laboratory, Subject, pair_of_subjects
from .model import CONFIG, PICTURE_EDGE
from .world import class_caption, random_scene, world_captions
from .world_sheet import images

WORKFLOWS = Path(__file__).resolve().parents[1] / "example_workflows"
PAIR = 50
_SMALL, _LARGE, _GAP = 160, 492, 6
_STYLE_WORDS = "<new2> art"


def write_thumbnails(folder: Path = WORKFLOWS) -> None:
    """One for each workflow, which its number names."""
    lab = Laboratory()
    pair = pair_of_subjects(PAIR, seed=0)
    one, two = pair
    style = _style_pictures()
    alone = [lab.teach([each], CONFIG) for each in pair]
    together = lab.teach(pair, TrainConfig(**{**CONFIG.as_json(), "steps": 2 * CONFIG.steps}))
    painted = _merged(lab, [alone[0], _taught_style(lab, style)])
    merged = _merged(lab, alone)

    def drawn(prompt: str, concept: Concept | None = None, routed: Sequence[Concept] = ()) -> Tiles:
        return images(lab.draw([prompt] * 6, concept, 0, routed=routed))

    in_style = f"painting of a {one.words} in the style of {_STYLE_WORDS}"
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
        8: (
            [given[0][:3], style[:3]],
            drawn(in_style, painted)[0],
        ),
        9: ([plain[:3]], night[0]),
    }
    for number, (columns, large) in pages.items():
        (workflow,) = folder.glob(f"{number} *.json")
        _page(columns, large).save(workflow.with_suffix(".jpg"), quality=88, optimize=True)


Tiles = list[Image.Image]


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


def _style_pictures() -> Tiles:
    rng = random.Random("thumbnails")
    scenes = [random_scene(rng, style=concept_style(0)) for _ in range(INSTANCE_IMAGES)]
    return [to_picture(picture) for picture in to_hwc(draw(scenes, PICTURE_EDGE))]


def _taught_style(lab: Laboratory, pictures: Tiles) -> Concept:
    token, noun = _STYLE_WORDS.split()
    caption = instance_caption(token, noun, STYLE_TEMPLATE)
    shown = tuple(CaptionedImage(picture, caption) for picture in pictures)
    training = TrainingConcept(shown, noun, token, template=STYLE_TEMPLATE)
    return lab.teach([Subject(pair_of_subjects(PAIR, 0)[0].look, token, training)], CONFIG)


def _merged(lab: Laboratory, concepts: Sequence[Concept]) -> Concept:
    return merge_concepts(concepts, lab.encoder, captions=world_captions())[0]


if __name__ == "__main__":
    write_thumbnails()
