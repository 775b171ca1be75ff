"""Regularization pictures that the base model draws itself, for those who have none of the class.

Kumari et al. measure what that costs (their Table 3): the class drifts further than
with real pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...concept.atomic import write_text_atomically
from ...concept.errors import ConfigError
from ...pictures.kept import claim_folder, save_picture
from ..data.captioned import CaptionedImage

Draw = Callable[[Sequence[int]], Tensor]
"""Numbers of pictures → those pictures (b, h, w, 3) in 0..1. A number always means one picture."""


def generated_set(
    folder: Path,
    settings: Mapping[str, Any],
    caption: str,
    count: int,
    draw: Draw,
    *,
    batch_size: int = 4,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[CaptionedImage, ...]:
    """`count` pictures in `folder`, each with its caption in a .txt; draws those that are missing.

    Every picture is complete or absent, so an interrupted set goes on where it stopped, and a set
    can be made larger later. `settings` are what the pictures depend on, as plain JSON values.
    Raises DataError when the folder holds something else, or pictures of other settings.
    """
    if count < 1 or batch_size < 1:
        raise ConfigError(f"count={count} and batch_size={batch_size} must be at least 1.")
    claim_folder(folder, {**settings, "caption": caption})
    paths = [folder / f"{number:05}.png" for number in range(count)]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    on_progress(count - len(missing), count)
    for start in range(0, len(missing), batch_size):
        numbers = missing[start : start + batch_size]
        for number, image_hwc in zip(numbers, draw(numbers), strict=True):
            write_text_atomically(paths[number].with_suffix(".txt"), caption)
            save_picture(paths[number], image_hwc)
        on_progress(count - len(missing) + start + len(numbers), count)
    return tuple(CaptionedImage(path, caption) for path in paths)
