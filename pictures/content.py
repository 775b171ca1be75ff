"""Takes from a picture's file what says nothing of its pixels, before a decoder sees it.

Decoders read comments, texts and profiles before the pixels: ComfyUI's own pictures are refused for
long workflows, and small files fill the memory or take minutes. What says which side is up stays.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Literal

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_ORIENTATION = (
    b"eXIf",
    b"iTXtXML:com.adobe.xmp\0",
    b"zTXtRaw profile type exif\0",  # ImageMagick's, packed or not
    b"tEXtRaw profile type exif\0",
)
_MOST_ORIENTATION_BYTES = 1 << 16
_JPEG_KEPT = (0xE0, 0xEE)  # JFIF, and Adobe's, which says how colours are stored
_JPEG_ORIENTATION = 0xE1
_JPEG_NOTHING = (0x00, *range(0xD0, 0xD9), 0xFF)
"""Markers without a segment, and what only fills the place before one"""
_JPEG_SCAN, _JPEG_END = 0xDA, 0xD9
_GIF_EXTENSION, _GIF_CONTROL = 0x21, 0xF9
_TIFF_ORDERS: dict[bytes, tuple[Literal["little", "big"], str]] = {
    b"II": ("little", "<"),
    b"MM": ("big", ">"),
}
_TIFF_LAYOUT = (("I", "H", "HHI4s"), ("Q", "Q", "HHQ8s"))
"""Of a TIFF and of a BigTIFF: an offset, how many tags there are, a tag"""
_TIFF_TYPE_BYTES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8), start=1))
_TIFF_DIRECTORIES = (0x8769, 0x8825, 0xA005)
"""Tags that say where EXIF, GPS and interoperability have a directory of their own"""
_TIFF_TILE_EDGES = (322, 323)
_TIFF_MOST_TAGS, _TIFF_MOST_DIRECTORIES = 1 << 16, 8


def without_comments(content: bytes) -> bytes:
    """The same PNG without texts, profiles and later frames, the same JPEG without comments and
    what programs have added, the same GIF without the comments before its first frame, which older
    Pillows read ever more slowly. Other content comes back as it is.
    """
    if content.startswith(_PNG):
        return b"".join([_PNG, *_png_chunks(content)])
    if content.startswith(b"\xff\xd8"):
        return b"".join([content[:2], *_jpeg_segments(content)])
    if content.startswith((b"GIF87a", b"GIF89a")) and len(content) > 13:
        return b"".join(_gif_blocks(content))
    return content


def claims_too_much(content: bytes, most_pixels: int) -> bool:
    """Whether the tags of a TIFF together say that they are longer than the file: thousands may
    mean the same bytes, and each is read. Or whether its tiles have too many pixels.
    """
    if content[:2] not in _TIFF_ORDERS or len(content) < 16:
        return False
    order, sign = _TIFF_ORDERS[content[:2]]
    big = content[2:4] in (b"+\0", b"\0+")
    at, count, tag = (struct.Struct(sign + code) for code in _TIFF_LAYOUT[big])
    directories = [*at.unpack_from(content, 8 if big else 4)]
    for start in directories:
        first = start + count.size
        if len(directories) > _TIFF_MOST_DIRECTORIES:
            return True
        if first > len(content):
            continue
        (entries,) = count.unpack_from(content, start)
        if entries > _TIFF_MOST_TAGS:
            return True
        stop = min(first + entries * tag.size, len(content) - tag.size + 1)
        tags = [tag.unpack_from(content, place) for place in range(first, stop, tag.size)]
        widths = [_TIFF_TYPE_BYTES.get(kind, 0) for _, kind, _, _ in tags]
        values = [
            (name, int.from_bytes(value[:width], order))
            for width, (name, _, _, value) in zip(widths, tags, strict=True)
        ]
        claimed = sum(width * tag[2] for width, tag in zip(widths, tags, strict=True))
        tile = math.prod(max(1, value) for name, value in values if name in _TIFF_TILE_EDGES)
        if claimed > len(content) or tile > most_pixels:
            return True
        inner = {value for name, value in values if name in _TIFF_DIRECTORIES}
        directories += sorted(inner.difference(directories))
    return False


def _png_chunks(content: bytes) -> Iterator[bytes]:
    start = len(_PNG)
    while start + 8 <= len(content):
        (length,) = struct.unpack_from(">I", content, start)
        end = start + 12 + length
        kind = content[start + 4 : start + 8]
        orientation = content.startswith(_PNG_ORIENTATION, start + 4)
        if kind in _PNG_KEPT or (orientation and length <= _MOST_ORIENTATION_BYTES):
            yield content[start:end]
        start = end


def _jpeg_segments(content: bytes) -> Iterator[bytes]:
    start, spare = content.find(b"\xff", 2), 2 * _MOST_ORIENTATION_BYTES
    while 0 <= start <= len(content) - 4:
        marker, length = struct.unpack_from(">xBH", content, start)
        if marker in _JPEG_NOTHING:
            start = content.find(b"\xff", start + 1)
            continue
        if marker < 0xC0 or marker in (_JPEG_SCAN, _JPEG_END):
            break
        end = start + 2 + length
        comment = 0xE0 <= marker <= 0xEF or marker == 0xFE
        if marker == _JPEG_ORIENTATION and length <= spare:
            spare -= length
            yield content[start:end]
        elif marker in _JPEG_KEPT or not comment:
            yield content[start:end]
        start = content.find(b"\xff", end)
    if start >= 0:
        yield content[start:]


def _gif_blocks(content: bytes) -> Iterator[bytes]:
    flags = content[10]
    start = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    yield content[:start]
    while start + 2 < len(content) and content[start] == _GIF_EXTENSION:
        end = start + 2
        while end < len(content) and content[end]:
            end += 1 + content[end]
        end += 1
        if content[start + 1] == _GIF_CONTROL:
            yield content[start:end]
        start = end
    yield content[start:]
