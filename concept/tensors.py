"""The one reader of .safetensors. What it hands out is memory of its own: the file can be changed,
cut short or deleted afterwards, and while it is read it is never mapped, so that cutting it short
then is an error and not the end of the process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .errors import ConceptFileError, UnreadableFileError
from .regular_files import NotRegularError, open_regular

LARGEST_HEADER = 8 << 20
"""Bytes. A whole checkpoint of SDXL has 0.3 million, a LyCORIS of all its layers 0.8; the tags of a
hundred thousand training pictures may add some"""
MOST_TENSORS = 1 << 15
"""A LyCORIS of all of SDXL's layers has six thousand"""
_LONGEST_NAME = 1000
_MOST_DIMENSIONS = 8
_MOST_NUMBERS = 1 << 40
_AGAIN = "Copy or download it again, or save the concept again"
_DTYPES = {
    name: getattr(torch, dtype)
    for name, dtype in {
        **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
        **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
        **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool"},
        **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "C64": "complex64"},
    }.items()
    if hasattr(torch, dtype)
}


@dataclass(frozen=True)
class Place:
    """A tensor in a file: what it is, and its bytes from `start` on, counted from the file's."""

    dtype: torch.dtype | None
    """None where this torch has no such type"""
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a .safetensors says of itself."""

    tensors: Mapping[str, Place]
    """By name, in the order of their bytes"""
    metadata: Mapping[str, str]
    file_bytes: int

    @classmethod
    def of(cls, text: bytes, file_bytes: int) -> Header:
        """Of the text of a header, which begins at byte 8 of a file. Raises ValueError unless it
        describes every byte behind it once.
        """
        # Before it is parsed, which takes long for so many; an escaped word is found below.
        _check_count(text.count(b'"data_offsets"'))
        try:
            entries: dict[str, Any] = json.loads(text.decode(), object_pairs_hook=_distinct)
        except RecursionError as error:
            raise ValueError("its brackets are too deep") from error
        if not isinstance(entries, dict):
            raise ValueError("it is no JSON object")
        metadata = entries.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise ValueError("its metadata are not texts")
        _check_count(len(entries))
        for word in (*entries, *metadata, *metadata.values()):
            word.encode()  # halves of characters: a ValueError
        body = 8 + len(text)
        places = {name: _place(name, entry, body) for name, entry in entries.items()}
        ordered = sorted(places.items(), key=lambda item: (item[1].start, item[1].size))
        end = body
        for name, place in ordered:
            if place.start != end:
                raise ValueError(f"{_short(name)} does not begin where the one before it ends")
            end += place.size
        if end != file_bytes:
            raise ValueError(
                f"the file's end is missing: {end} bytes are needed, it has {file_bytes}"
                if end > file_bytes
                else f"{file_bytes - end} bytes behind its tensors belong to none"
            )
        return cls(dict(ordered), metadata, file_bytes)


def read_header(path: Path) -> Header:
    """The header of any .safetensors. Raises ConceptFileError."""
    with opened(path) as file:
        return _header(path, file)


def read_tensors(
    path: Path, choose: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors whose names `choose` accepts, and the metadata, of any .safetensors; nothing else
    of the file is read. Raises ConceptFileError.
    """
    with opened(path) as file:
        header = _header(path, file)
        chosen = {name: place for name, place in header.tensors.items() if choose(name)}
        strange = next((name for name, place in chosen.items() if place.dtype is None), None)
        if strange is not None:
            raise UnreadableFileError(
                path,
                f"{_short(strange)} is of a type that torch {torch.__version__} does not have",
                "Save it in half precision, or update torch",
            )
        tensors = {}
        for name, place in chosen.items():
            content = torch.empty(place.size, dtype=torch.uint8)
            if not read_into(file, place.start, content):
                raise UnreadableFileError(path, "its end is missing", _AGAIN)
            assert place.dtype is not None
            tensors[name] = content.view(place.dtype).reshape(place.shape)
        return tensors, dict(header.metadata)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """An ordinary file, for reading: folders and devices are refused, and pipes, which would be
    waited for. Raises ConceptFileError, also where the system fails while it is read.
    """
    try:
        with open_regular(path) as file:
            yield file
    except NotRegularError as error:
        raise UnreadableFileError(path, str(error.strerror), "Give a file of weights") from error
    except FileNotFoundError as error:
        raise ConceptFileError(
            f"There is no concept file {path}. Check the name, or train and save the concept first."
        ) from error
    except OSError as error:
        raise UnreadableFileError(
            path, f"it cannot be opened: {error.strerror}", "Check its permissions and its disk"
        ) from error


def read_into(file: BinaryIO, start: int, content: Tensor) -> bool:
    """Fills bytes, (n,) of uint8, from a place in the file; whether all of them were there."""
    file.seek(start)
    return not len(content) or file.readinto(content.numpy()) == len(content)  # type: ignore[attr-defined]


def at_least_half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, with floats of 8 bits, which cannot be computed with, in float16."""
    return {
        name: tensor.half() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
        for name, tensor in tensors.items()
    }


_UNPACK = "Unpack it, and give what was in it"
_WEIGHTS = "Give a file of weights, as .safetensors"
_OTHERS = {
    b"\x1f\x8b": ("packed with gzip", _UNPACK),
    b"7z\xbc\xaf": ("packed with 7-Zip", _UNPACK),
    b"Rar!": ("packed with RAR", _UNPACK),
    b"GGUF": ("a quantised model (GGUF)", "Give the same model as .safetensors"),
    b"\x89PNG": ("a picture", _WEIGHTS),
    b"\xff\xd8\xff": ("a picture", _WEIGHTS),
    b"\x89HDF": ("an HDF5 file", _WEIGHTS),
}
"""What files begin with → what they are, and what to do"""


def imposter(start: bytes) -> tuple[str, str] | None:
    """What a file is by its first bytes, and what to do, where it is no file of weights at all."""
    if not start:
        return "it is truncated to nothing", _AGAIN
    for magic, (kind, remedy) in _OTHERS.items():
        if start.startswith(magic):
            return f"it is {kind}", remedy
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return (
            "it is a pointer of Git LFS, which stands for the file itself",
            "Download the file, or run `git lfs pull`, and copy it again",
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page, not the file that was to be downloaded", "Download it again"
    if text.startswith((b'{"', b"{\n", b"{ ", b"[")):
        return "it is a JSON text, perhaps an error of the server", "Download it again"
    return None


def _header(path: Path, file: BinaryIO) -> Header:
    size = os.fstat(file.fileno()).st_size
    start = file.read(100)
    length = int.from_bytes(start[:8], "little")
    # The length that a .safetensors begins with can be any of these bytes; a brace follows it.
    if start[8:9] != b"{":
        if start[:2] in (b"PK", *(bytes([0x80, n]) for n in range(2, 6))):
            raise UnreadableFileError(
                path,
                "it is a pickle, a PyTorch archive of them or another zip, with the wrong ending; "
                "pickles can run code when opened, so it was not",
                "Ask for the concept as .safetensors",
            )
        if found := imposter(start):
            raise UnreadableFileError(path, *found)
    if len(start) < 9 or start[8:9] != b"{" or length > size - 8:
        raise UnreadableFileError(
            path,
            f"it is truncated, or not a .safetensors file at all: it has {size} bytes",
            _AGAIN,
        )
    if length > LARGEST_HEADER:
        raise UnreadableFileError(
            path,
            f"its header has {length / 1e6:.0f} MB; {LARGEST_HEADER / 1e6:.0f} MB are the most",
            "Save it again without what its header says of its training",
        )
    file.seek(8)
    text = file.read(length)
    try:
        return Header.of(text, size)
    except ValueError as error:
        raise UnreadableFileError(path, f"its header is damaged ({error})", _AGAIN) from error


def _check_count(tensors: int) -> None:
    if tensors > MOST_TENSORS:
        raise ValueError(f"it names {tensors} tensors; {MOST_TENSORS} are the most")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("it names something twice")
    return entries


def _place(name: str, entry: Any, body: int) -> Place:
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"{_short(name)} is a name of {len(name)} characters")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{_short(name)} is no tensor")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(kind, str) and _are_sizes(shape) and _are_sizes(offsets)):
        raise ValueError(f"{_short(name)} has no type, shape or place")
    numbers = math.prod(max(size, 1) for size in shape[: _MOST_DIMENSIONS + 1])
    if len(shape) > _MOST_DIMENSIONS or numbers > _MOST_NUMBERS:
        raise ValueError(f"{_short(name)} has a shape that no tensor has")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{_short(name)} has no place")
    size, dtype = offsets[1] - offsets[0], _DTYPES.get(kind)
    if dtype is not None and math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{_short(name)} has {size} bytes, which do not fill its shape {shape}")
    return Place(dtype, tuple(shape), body + offsets[0], size)


def _are_sizes(value: Any) -> bool:
    """Whether it is a list of whole numbers that a file can have; true and false are none."""
    return isinstance(value, list) and all(
        type(number) is int and 0 <= number < 1 << 63 for number in value
    )


def _short(name: str) -> str:
    return name[:100]
