"""What lies in a file from anywhere, read without running any of it.

Two containers are in use: safetensors, and PyTorch's archive, which is a pickle in a zip. Of the
latter torch's own restricted reader builds tensors and plain containers only. A forged file must
end in a message: so sizes are compared with those of the file before anything is built of them.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..concept.errors import ConceptFileError
from ..concept.file import read_tensors

ENDINGS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
"""How such files are called; what they are is decided by content"""

_ZIP_START = b"PK\x03\x04"
_LARGEST_PICKLE = 64 << 20
"""Bytes of structure in an archive; that of a whole checkpoint has less than a million"""


@dataclass(frozen=True)
class Content:
    """A file's tensors by name, nested as they were, and the texts of its header."""

    path: Path
    values: Mapping[str, Any]
    """Tensors, containers and plain values"""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Those on the first level."""
        return tensors_of(self.values)

    def part(self, name: str) -> Mapping[str, Any]:
        """The container of that name; empty where there is none."""
        return container(self.values.get(name))


def container(value: object) -> Mapping[str, Any]:
    """The value where it is a mapping with names for keys, else an empty one."""
    return value if isinstance(value, dict) and all(isinstance(k, str) for k in value) else {}


def tensors_of(values: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def read_content(path: Path) -> Content:
    """Reads a .safetensors or a PyTorch archive (.bin, .ckpt, .pt, .pth), whatever its name is.

    Raises ConceptFileError that says what is wrong with the file and what to do.
    """
    if not path.is_file():
        raise ConceptFileError(f"There is no concept file {path}. Check the name.")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ConceptFileError(f"{path.name} cannot be opened: {error.strerror}.") from error
    if start.startswith(_ZIP_START):
        return Content(path, _read_archive(path))
    if start[8:] == b"{":
        tensors, metadata = read_tensors(path)
        return Content(path, tensors, metadata)
    raise ConceptFileError(
        f"{path.name} is neither a .safetensors nor a PyTorch archive. If it comes from a PyTorch "
        "older than 1.6, it is a bare pickle, which can run code when opened: ask for it as "
        ".safetensors. If it should be one of the others, it is damaged: copy it again."
    )


def _read_archive(path: Path) -> Mapping[str, Any]:
    _check_archive(path)
    try:
        # Mapped, not read: storages are then cut out of the file within its bounds.
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a forged archive makes the reader raise
        raise ConceptFileError(
            f"{path.name} is a PyTorch archive that cannot be read as plain tensors "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'})"
            ". It is damaged, or holds objects that run code when opened, which was not done. "
            "Copy it again, or ask for it as .safetensors."
        ) from error
    values = {"": values} if isinstance(values, Tensor) else container(values)
    size = path.stat().st_size
    for tensor in _all_tensors(values):
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ConceptFileError(
                f"{path.name} holds a {tensor.layout} tensor on {tensor.device}; dense ones on the "
                "CPU are needed. Save it again with ordinary tensors."
            )
        if tensor.numel() * tensor.element_size() > size:
            raise ConceptFileError(
                f"{path.name} claims a tensor of shape {tuple(tensor.shape)}, more than the whole "
                f"file of {size} bytes can hold. It is damaged or forged: take another copy."
            )
    return values


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ConceptFileError(
            f"{path.name} is a PyTorch archive whose end is missing or damaged ({error}). "
            "Copy or download it again."
        ) from error
    structure = max((e.file_size for e in entries if e.filename.endswith(".pkl")), default=0)
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or structure > _LARGEST_PICKLE:
        raise ConceptFileError(
            f"{path.name} is a zip file, but not one that PyTorch wrote: its entries are "
            "compressed, or its structure is too large. Give the file of weights itself."
        )


def _all_tensors(values: object) -> Iterator[Tensor]:
    """Every tensor in nested containers. A container that is met again is not entered again."""
    seen: set[int] = set()
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
