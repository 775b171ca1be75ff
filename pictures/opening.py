"""The one place that opens pictures, whoever made them: from a file, or from bytes in memory."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

from ..concept.errors import DataError
from ..concept.regular_files import read_regular
from .colours import in_colours
from .content import claims_too_much, without_comments

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif"),
)
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")
"""What content may be, whatever a file is called. Pillow knows forty more: PostScript, for which it
runs another program, and many that are hardly tested.
"""
MOST_BYTES = 500_000_000
MOST_PIXELS = 120_000_000
"""Phones take up to 108 megapixels. A decoder needs up to 16 bytes for each, and a few
kilobytes can claim any number; a training looks at one megapixel.
"""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation → what makes it upright"""
_ON_ITS_SIDE = (5, 6, 7, 8)
_DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(AssertionError, EOFError, MemoryError, RuntimeError, BufferError, Warning),
    *(struct.error, zlib.error),
)
"""What Pillow raises for content that is no picture, or a broken one"""


class PictureError(DataError):
    """One picture cannot be used; others beside it can."""


def read_picture(path: Path) -> Image.Image:
    """The first frame of a file, upright, in RGB or RGBA. Raises PictureError naming the file."""
    return decode_picture(_content(path), str(path))


def read_size(path: Path) -> tuple[int, int]:
    """Width and height of what `read_picture` returns, mostly without decoding it."""
    with _opened(_content(path), str(path)) as image:
        if image.format == "TIFF":  # its decoder turns it by itself, in old versions late
            image.load()
        width, height = image.size
        return (height, width) if _orientation(image) in _ON_ITS_SIDE else (width, height)


def decode_picture(content: bytes, name: str) -> Image.Image:
    """The first frame of a file's content, upright, in RGB or RGBA. Raises PictureError with the
    name.
    """
    with _opened(content, name) as image:
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        picture: Image.Image = image
        if image.format == "WEBP":  # its decoder would stay with it, and takes as much again
            picture = image.copy()
        picture = in_colours(picture)
        return picture if turn is None else picture.transpose(turn)


def _content(path: Path) -> bytes:
    try:
        return read_regular(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        raise _unreadable(str(path), getattr(error, "strerror", None) or error) from error


@contextmanager
def _opened(content: bytes, name: str) -> Iterator[Image.Image]:
    """A picture whose header is read; what goes wrong with it in the context is a PictureError."""
    if claims_too_much(content, MOST_PIXELS):
        raise _unreadable(name, "its tags claim too much")
    try:
        with Image.open(io.BytesIO(without_comments(content)), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except UnidentifiedImageError as error:
        raise _unreadable(name, f"it is none of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise PictureError(
            f"{name} has more than {MOST_PIXELS // 10**6} megapixels. A training looks at one or "
            f"two: make it smaller."
        ) from error
    except _DECODER_ERRORS as error:
        raise _unreadable(name, str(error) or type(error).__name__) from error


def _orientation(image: Image.Image) -> int:
    """Of its camera; 1, upright, where what the camera noted is broken."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _DECODER_ERRORS:
        return 1
    return orientation if isinstance(orientation, int) else 1


def _unreadable(name: str, reason: object) -> PictureError:
    return PictureError(
        f"{name} cannot be read as a picture ({reason}). Remove it from the folder, or export it "
        f"again as PNG or JPEG."
    )
