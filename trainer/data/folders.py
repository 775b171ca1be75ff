"""Folders of pictures, with the captions, masks and repeats that lie there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ...concept.errors import DataError
from ...concept.regular_files import read_regular
from ...pictures.opening import IMAGE_SUFFIXES
from .captioned import MOST_REPEATS, CaptionedImage

MASK_ENDING = ".mask.png"
"""`cat1.mask.png` beside `cat1.jpg` says where the picture counts: in the white."""


MOST_CAPTION_BYTES = 64_000


_REPEATED_FOLDER = re.compile(r"(\d+)_(.*)")


def load_folder(folder: Path, default_caption: str) -> tuple[CaptionedImage, ...]:
    """Every picture of a folder, by name, with the caption in the `.txt` and the mask in the
    `.mask.png` beside it where there are such files.

    Pictures in a folder inside, `10_cat`, have that many repeats, as kohya's scripts have it.
    Raises DataError when the folder is missing, holds no picture, or means too many repeats.
    """
    if not os.path.isdir(folder):
        raise DataError(f"There is no folder {folder}. Make it and put the pictures in.")
    images = [_image(path, default_caption) for path in _pictures_in(folder)]
    for inner in sorted(path for path in folder.iterdir() if os.path.isdir(path)):
        repeated = _REPEATED_FOLDER.fullmatch(inner.name)
        if repeated and (paths := _pictures_in(inner)):
            repeats = _repeats(inner, *repeated.groups())
            images += [_image(path, default_caption, repeats) for path in paths]
    if not images:
        raise DataError(
            f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)}). Put 4 to 20 pictures of "
            "the concept there."
        )
    return tuple(images)


def _image(path: Path, default_caption: str, repeats: int = 1) -> CaptionedImage:
    caption = _caption_beside(path) or default_caption
    return CaptionedImage(path, caption, _mask_beside(path), repeats)


def _repeats(folder: Path, number: str, rest: str) -> int:
    if 1 <= int(number) <= MOST_REPEATS:
        return int(number)
    raise DataError(
        f"The folder {folder} means that each of its pictures counts {int(number)} times: a number "
        f"before an underscore is that of repeats, 1 to {MOST_REPEATS}. Rename it: to "
        f"'1_{rest or 'pictures'}' to use its pictures, to '{rest or 'pictures'}' not to."
    )


def _pictures_in(folder: Path) -> list[Path]:
    """Whatever is called like a picture: what is none is refused when it is opened."""
    try:
        return sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.endswith(MASK_ENDING)
        )
    except OSError as error:
        raise DataError(
            f"The folder {folder} cannot be read ({error.strerror}). Allow it, or move it away."
        ) from error


def _mask_beside(path: Path) -> Path | None:
    mask = path.with_suffix(MASK_ENDING)
    return mask if os.path.lexists(mask) else None


def _caption_beside(path: Path) -> str:
    text_file = path.with_suffix(".txt")
    if not os.path.lexists(text_file):
        return ""
    try:
        return " ".join(read_regular(text_file, MOST_CAPTION_BYTES).decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise DataError(f"{text_file} is not a UTF-8 text file. Save it as UTF-8 text.") from error
    except OSError as error:
        raise DataError(
            f"The caption {text_file} cannot be read ({error.strerror}). Put a short text file "
            f"there, or none."
        ) from error
