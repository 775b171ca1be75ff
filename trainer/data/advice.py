"""What is not wrong with the pictures of a concept, but makes it learn worse than it could."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from .training_concept import TrainingConcept

FEWEST, MOST = 4, 20
"""Pictures that the paper calls enough"""
SMALL_PIXELS = 256
_HASH_EDGE = 8


def advice(concept: TrainingConcept) -> Iterator[str]:
    """One sentence for each thing that a user may want to mend. Opens every instance image."""
    count = len(concept.images)
    if count < FEWEST:
        yield f"{count} pictures are few: {FEWEST} to {MOST} teach a concept well."
    names = [
        image.source.name if isinstance(image.source, Path) else f"picture {number}"
        for number, image in enumerate(concept.images, start=1)
    ]
    small: list[str] = []
    alike: list[str] = []
    looks: dict[bytes, str] = {}
    for name, captioned in zip(names, concept.images, strict=True):
        picture = captioned.open().image
        if min(picture.size) < SMALL_PIXELS:
            small.append(f"{name} ({picture.width} x {picture.height} pixels)")
        look = _difference_hash(picture)
        if look in looks:
            alike.append(f"{name} looks the same as {looks[look]}: it counts twice.")
        looks.setdefault(look, name)
    if small:
        yield f"Small, so it is enlarged, and its blur is learnt: {_some(small)}."
    yield from alike
    plain = [
        name
        for name, image in zip(names, concept.images, strict=True)
        if image.caption == concept.prompt
    ]
    if 0 < len(plain) < count:
        yield f"Without a caption of their own: {_some(plain)}. They get '{concept.prompt}'."
    if not concept.token and not concept.regularization:
        yield (
            f"There is no trigger word, so {concept.class_noun!r} itself is taught, and there "
            f"are no regularization pictures: the model may draw every {concept.class_noun} like "
            f"this one."
        )


def _difference_hash(picture: Image.Image) -> bytes:
    """Which of neighbouring shades is the lighter, in a small copy: survives scaling and JPEG."""
    small = picture.convert("L").resize((_HASH_EDGE + 1, _HASH_EDGE), Image.Resampling.BOX)
    shades = np.asarray(small, np.int16)
    return np.packbits(shades[:, 1:] > shades[:, :-1]).tobytes()


def _some(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
