"""What lists and cards say of any file of weights: of another tool's, what its header tells.

The readers that would open such a file judge it here too. They get tensors that have shapes and no
numbers, so that a large file costs no more than a small one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path

from ..concept.errors import ConceptFileError, IncompatibleModelError, OtherFileError
from ..concept.layers import Family
from ..concept.tensors import opened
from ..formats.content import Content, read_shapes
from ..formats.custom_diffusion import read_a1111_delta, read_processors
from ..formats.embeddings import read_embeddings
from ..formats.found import Found
from ..formats.importing import family_of
from ..formats.lora import read_lora
from .card import ConceptCard, read_card, thumbnail

UNKNOWN = "unknown"


_READERS: tuple[tuple[str, Callable[[Content], Found | None]], ...] = (
    ("delta", read_a1111_delta),
    ("delta", read_processors),
    ("lora", read_lora),
    ("embedding", read_embeddings),
)
"""Of the kinds of .safetensors, in the order of `READERS`"""


def read_any_card(path: Path) -> ConceptCard:
    """`read_card`, and a card of another tool's file. Raises ConceptFileError."""
    with opened(path) as file:
        status = os.fstat(file.fileno())
    card = _card(path, status.st_size, status.st_mtime_ns, status.st_ino)
    if isinstance(card, str):
        raise ConceptFileError(card)
    return replace(card, thumbnail=thumbnail(path) is not None)


@lru_cache(maxsize=4096)
def _card(path: Path, size: int, changed_ns: int, _number: int) -> ConceptCard | str:
    """The card, or why there is none. Kept as long as the file stays the same, because a list is
    asked for at every letter of a search.
    """
    try:
        return read_card(path)
    except OtherFileError:
        pass
    except ConceptFileError as error:
        if isinstance(error.__cause__, OSError):
            raise  # of the moment, not of the file
        return str(error)
    # The header of an archive is a pickle.
    kind, found = _judged(read_shapes(path)) if path.suffix == ".safetensors" else (UNKNOWN, None)
    family = _family_told(found) if found else None
    return ConceptCard(
        file=path.name,
        megabytes=round(size / 1e6, 2),
        base=family.name if family else "",
        family=family.title if family else "",
        prompts=tuple(found.tokens) if found else (),
        method="",
        steps=None,
        resolution=None,
        created=_date(changed_ns),
        thumbnail=False,
        other=kind,
    )


def _date(changed_ns: int) -> str:
    """ISO 8601, UTC; empty for a date that no calendar has."""
    try:
        changed = datetime.fromtimestamp(changed_ns // 10**9, timezone.utc)
    except (ValueError, OverflowError, OSError):
        return ""
    return changed.isoformat(timespec="seconds")


def _judged(content: Content) -> tuple[str, Found | None]:
    """The kind of the file, and what is in it unless that is damaged."""
    for kind, read in _READERS:
        try:
            found = read(content)
        except (ValueError, RuntimeError, OverflowError):
            return kind, None  # Load Concept says what is wrong with it
        if found:
            return kind, found
    return UNKNOWN, None


def _family_told(found: Found) -> Family | None:
    shapes = {layer: delta.shape for layer, delta in found.deltas.items()}
    for layer, one in found.relative.items():
        out, width = one.shape
        if out is not None and width is not None:
            shapes[layer] = (out, width)
    try:
        return family_of(found, shapes)
    except (ValueError, IndexError, IncompatibleModelError):
        return None  # nothing in the header tells
