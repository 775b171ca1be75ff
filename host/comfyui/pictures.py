"""The pictures of a folder, for the node that has chosen it: which there are, a small copy of one,
and taking one out.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ...concept.errors import DataError, UnknownPictureError
from ...trainer.data.captioned import CaptionedImage
from ...trainer.data.folders import files_beside, pictures_in
from .paths import input_folder

BIN = ".deleted"
"""The folder beside the pictures, which is hidden, and the end of names in it: nobody takes what
lies there for pictures.
"""
_EDGE = 128
_QUALITY = 80


def picture_names(folder: str) -> list[str]:
    """Raises DataError where there is no such folder."""
    return [path.name for path in pictures_in(input_folder(folder))]


def picture_thumbnail(folder: str, name: str) -> bytes:
    """A small WebP of it, all of it. Raises PictureError for what is none."""
    image = CaptionedImage(_picture(folder, name), "").open().image
    image.thumbnail((_EDGE, _EDGE), Image.Resampling.BOX, reducing_gap=2)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=_QUALITY)
    return file.getvalue()


def bin_picture(folder: str, name: str) -> Path:
    """Moves a picture, with its captions and its mask, into the hidden folder `.deleted` beside it,
    from where it can be moved back by hand. Returns where it is then.

    Raises DataError where the system does not allow it.
    """
    picture = _picture(folder, name)
    target = picture.parent / BIN
    try:
        target.mkdir(exist_ok=True)
        for path in files_beside(picture):
            os.rename(path, _free(target, path.name))
        moved = _free(target, picture.name)
        os.rename(picture, moved)
    except OSError as error:
        raise DataError(
            f"{name} could not be moved ({error.strerror}). Close the program that has it open, "
            f"or look at the permissions of its folder, and try again."
        ) from error
    return moved


def _picture(folder: str, name: str) -> Path:
    """One of those that `picture_names` lists: no path that somebody sends."""
    for path in pictures_in(input_folder(folder)):
        if path.name == name:
            return path
    raise UnknownPictureError(f"There is no picture {name[:100]!r} in the folder {folder[:100]!r}.")


def _free(folder: Path, name: str) -> Path:
    return next(path for path in _names(folder, name) if not os.path.lexists(path))


def _names(folder: Path, name: str) -> Iterator[Path]:
    yield folder / f"{name}{BIN}"
    for number in itertools.count(2):
        yield folder / f"{name}-{number}{BIN}"
