"""What a concept file is, for lists and cards: read from its header, so that a library of them is
listed in no time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..concept.errors import OtherFileError
from ..concept.header import ConceptHeader
from ..concept.naming import THUMBNAIL
from ..concept.tensors import read_header

_LARGEST = 1 << 16  # no training's pictures are: what is stranger is not shown
PICTURES = (THUMBNAIL, ".preview.jpg", ".preview.jpeg", ".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class ConceptCard:
    """A concept file in a few words."""

    file: str
    megabytes: float
    base: str
    """Family of the base model, by its name: `sd15`"""
    family: str
    """The same as people say it"""
    prompts: tuple[str, ...]
    """How prompts speak of it: `<new1> cat`"""
    method: str
    steps: int | None
    resolution: int | None
    """Edge in pixels of the pictures it was taught with"""
    created: str
    """ISO 8601, UTC"""
    thumbnail: bool
    """Whether there is a picture beside it"""
    other: str = ""
    """What kind of another tool's file it is; empty for a concept. Such a file has no method, its
    date is that of its last change, and its base is empty where it does not tell."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_card(path: Path) -> ConceptCard:
    """Reads the header of a concept file. Raises ConceptFileError when it is no such file;
    OtherFileError for files of other tools, which are not opened where their name says so.
    """
    if path.suffix != ".safetensors" and os.path.isfile(path):
        raise OtherFileError(
            f"{path.name} is another tool's file. The node Load Concept and the command "
            "`custom-diffusion import` make a concept of it."
        )
    file = read_header(path)
    header = ConceptHeader.of(path, file.metadata)
    return ConceptCard(
        file=path.name,
        megabytes=round(file.file_bytes / 1e6, 2),
        base=header.family.name,
        family=header.family.title,
        prompts=tuple(f"{word.name} {word.class_noun}".strip() for word in header.words),
        method=header.method,
        steps=header.steps,
        resolution=_resolution(header.provenance),
        created=header.created,
        thumbnail=thumbnail(path) is not None,
    )


def _resolution(provenance: Mapping[str, Any]) -> int | None:
    """None where the file does not say, or something else."""
    config = provenance.get("config")
    value = config.get("resolution") if isinstance(config, Mapping) else None
    return value if type(value) is int and 0 < value <= _LARGEST else None


def thumbnail(path: Path) -> Path | None:
    """The picture beside a concept file that shows what it is, where there is one."""
    pictures = (path.with_suffix(suffix) for suffix in PICTURES)
    return next((picture for picture in pictures if os.path.isfile(picture)), None)
