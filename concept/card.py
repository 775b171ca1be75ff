"""What a concept file is, for lists and cards: read from its header, so that a library of them is
listed in no time.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import ConceptFileError
from .file import read_metadata
from .layers import FAMILIES

THUMBNAIL = ".preview.png"
"""`my-cat.preview.png` beside `my-cat.safetensors`, where ComfyUI and its model managers look."""
_PICTURES = (THUMBNAIL, ".preview.jpg", ".preview.jpeg", ".png", ".jpg", ".jpeg", ".webp")


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
    """Reads the header of a concept file. Raises ConceptFileError when it is no such file."""
    metadata = read_metadata(path)
    try:
        tokens = json.loads(metadata.get("tokens", "[]"))
        provenance = json.loads(metadata.get("provenance", "{}"))
        return ConceptCard(
            file=path.name,
            megabytes=round(path.stat().st_size / 1e6, 2),
            base=metadata["base_family"],
            family=FAMILIES[metadata["base_family"]].title,
            prompts=tuple(f"{t['name']} {t['class_noun']}".strip() for t in tokens),
            method=str(provenance.get("method", "")),
            steps=provenance.get("steps"),
            created=metadata.get("created", ""),
            thumbnail=thumbnail(path) is not None,
        )
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConceptFileError(
            f"{path.name} calls itself a concept file but its header is damaged "
            f"({type(error).__name__}: {error}). Take another copy of the file."
        ) from error


def thumbnail(path: Path) -> Path | None:
    """The picture beside a concept file that shows what it is, where there is one."""
    pictures = (path.with_suffix(suffix) for suffix in _PICTURES)
    # Path.is_file raises where the name would be too long; this says no.
    return next((picture for picture in pictures if os.path.isfile(picture)), None)
