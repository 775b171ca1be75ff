"""What lies in a file from anywhere, read without running any of it.

Two containers are in use: safetensors, and PyTorch's archive, which is a pickle in a zip. A forged
file must end in a message: so sizes are compared with those of the file before anything is built of
them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..concept.errors import ConceptFileError, UnreadableFileError
from ..concept.tensors import at_least_half, imposter, opened, read_header, read_tensors
from .archive import read_archive
from .zip_entries import OtherZipError

ENDINGS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".pti")
"""How such files are called; what they are is decided by content"""

_ZIP_START = b"PK\x03\x04"
_PICKLES = (
    *(bytes([0x80, protocol]) for protocol in range(2, 6)),
    b"(dp",
    b"(lp",
    b"cposix\n",
    b"ccopy",
)
"""How pickles begin, of the later protocols and of the first"""
_LONGEST_PATH = 300
"""Characters of a container's path; deeper ones need none of their own"""


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

    def tensor_paths(self) -> list[str]:
        """Every tensor in it, `state_dict/embed`; one of the paths of what lies in several."""
        paths, seen = [], set()
        open_containers: list[tuple[str, Any]] = [("", self.values)]
        while open_containers:
            place, value = open_containers.pop()
            if id(value) in seen:  # an archive may hold a container in itself
                continue
            seen.add(id(value))
            inner = value.items() if isinstance(value, Mapping) else enumerate(value)
            for name, part in inner:
                path = f"{place}/{name}" if place else str(name)
                if isinstance(part, Tensor):
                    paths.append(path)
                elif isinstance(part, Mapping | list | tuple):
                    open_containers.append((path[:_LONGEST_PATH], part))
        return paths


def container(value: object) -> Mapping[str, Any]:
    """The value where it is a mapping with names for keys, else an empty one."""
    return value if isinstance(value, dict) and all(isinstance(k, str) for k in value) else {}


def tensors_of(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of the values that are tensors; floats of 8 bits in half precision."""
    return at_least_half({n: value for n, value in values.items() if isinstance(value, Tensor)})


def read_shapes(path: Path) -> Content:
    """A .safetensors by its header alone: tensors that have no numbers, apart from single ones,
    which are 1 (an alpha, say). Raises ConceptFileError.
    """
    header = read_header(path)
    tensors = {
        name: torch.ones(place.shape)
        if all(size == 1 for size in place.shape)
        else torch.empty(place.shape, device="meta")
        for name, place in header.tensors.items()
    }
    return Content(path, tensors, header.metadata)


def read_content(path: Path, judge: Callable[[Content], object] = lambda shapes: None) -> Content:
    """Reads a .safetensors or a PyTorch archive (.bin, .ckpt, .pt, .pth), whatever its name is.

    Of a .safetensors that `judge` raises an error for, nothing but its header is read.
    Raises ConceptFileError that says what is wrong with the file and what to do.
    """
    with opened(path) as file:
        start = file.read(100)
        if start.startswith(_ZIP_START):
            return Content(path, _named(path, _unpacked(path, file)))
    if start[8:9] == b"{":
        judge(read_shapes(path))
        tensors, metadata = read_tensors(path)
        return Content(path, tensors, metadata)
    if found := imposter(start):
        raise UnreadableFileError(path, *found)
    if start.startswith(_PICKLES):
        raise ConceptFileError(
            f"{path.name} is a bare pickle, which can run code when opened: ask for it as "
            ".safetensors. PyTorch before 1.6 wrote files so; it was not opened."
        )
    raise ConceptFileError(
        f"{path.name} is neither a .safetensors nor a PyTorch archive: it begins with "
        f"{start[:16]!r}. Copy it again, or ask for it as .safetensors."
    )


def _unpacked(path: Path, file: BinaryIO) -> object:
    """What lies in an archive. Raises ConceptFileError."""
    try:
        return read_archive(file, os.fstat(file.fileno()).st_size)
    except OtherZipError as error:
        raise ConceptFileError(f"{path.name} cannot be read: {error}.") from error
    except ValueError as error:
        raise ConceptFileError(
            f"{path.name} is a PyTorch archive that cannot be read as plain tensors: {error}. It "
            "is damaged, or holds objects that run code when opened, which was not done. Copy it "
            "again, or ask for it as .safetensors."
        ) from error


def _named(path: Path, values: object) -> Mapping[str, Any]:
    """What an archive holds, by name: a lone tensor has none. Of a list of containers, as some
    embeddings are, all that is in them.
    """
    if isinstance(values, Tensor):
        return {"": values}
    if isinstance(values, list) and values and all(container(value) for value in values):
        names = [name for value in values for name in value]
        if len(set(names)) == len(names):
            return {name: part for value in values for name, part in value.items()}
    if container(values) or values == {}:
        return container(values)
    if isinstance(values, dict):
        held = ", ".join(str(name)[:100] for name in list(values)[:3])
        what = f"names its parts {held}, as a hypernetwork does"
    else:
        what = f"holds a {type(values).__name__} without names, as a LoRA of the first script does"
    raise ConceptFileError(
        f"{path.name} is a PyTorch archive that {what}. A concept cannot hold that. Custom "
        f"Diffusion deltas, LoRAs of cross-attention, and textual-inversion embeddings can be read."
    )
