"""What lists and cards say of any file of weights: of another tool's, what its header tells.

The readers that would open such a file judge it here too. They get tensors that have shapes and no
numbers, so that a large file costs no more than a small one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..concept.card import ConceptCard, read_card, thumbnail
from ..concept.concept import DenseDelta
from ..concept.errors import ConceptFileError, IncompatibleModelError, OtherFileError
from ..concept.layers import Family
from .content import Content
from .custom_diffusion import read_a1111_delta
from .embeddings import read_embeddings
from .found import Found
from .importing import family_of
from .lora import read_lora
from .names import layer_of_hugging_face

UNKNOWN = "unknown"


def _read_hugging_face(content: Content) -> Found | None:
    """Without the words, for which `read_hugging_face` reads the files beside this one."""
    found = Found("")
    for name, tensor in content.tensors().items():
        if layer := layer_of_hugging_face(name.removesuffix(".weight")):
            found.whole[layer] = tensor
    return found if found.whole else None


_READERS: tuple[tuple[str, Callable[[Content], Found | None]], ...] = (
    ("delta", read_a1111_delta),
    ("delta", _read_hugging_face),
    ("lora", read_lora),
    ("embedding", read_embeddings),
)
"""Of the kinds of .safetensors, in the order of `READERS`"""


def read_any_card(path: Path) -> ConceptCard:
    """`read_card`, and a card of another tool's file. Raises ConceptFileError."""
    try:
        return read_card(path)
    except OtherFileError:
        return _other_card(path)


def _other_card(path: Path) -> ConceptCard:
    status = path.stat()
    kind, family, words = _told(path, status.st_mtime_ns)
    changed = datetime.fromtimestamp(status.st_mtime, timezone.utc)
    return ConceptCard(
        file=path.name,
        megabytes=round(status.st_size / 1e6, 2),
        base=family.name if family else "",
        family=family.title if family else "",
        prompts=words,
        method="",
        steps=None,
        created=changed.isoformat(timespec="seconds"),
        thumbnail=thumbnail(path) is not None,
        other=kind,
    )


@lru_cache(maxsize=1024)
def _told(path: Path, changed_ns: int) -> tuple[str, Family | None, tuple[str, ...]]:
    """Kind, family and words. Kept, because a LoRA of SDXL takes a tenth of a second and a list is
    asked for at every letter of a search.
    """
    if path.suffix != ".safetensors":
        return UNKNOWN, None, ()  # the header of an archive is a pickle
    kind, found = _judged(_header(path))
    return (kind, _family_told(found), tuple(found.tokens)) if found else (kind, None, ())


def _header(path: Path) -> Content:
    """Tensors without numbers, apart from single ones, which are 1 (an alpha, say)."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ConceptFileError(
            f"{path.name} cannot be read ({error}). Take another copy of the file."
        ) from error
    tensors = {
        name: torch.empty(shape, device="meta") if math.prod(shape) > 1 else torch.ones(shape)
        for name, shape in shapes.items()
    }
    return Content(path, tensors, metadata)


def _judged(content: Content) -> tuple[str, Found | None]:
    """The kind of the file, and what is in it unless that is damaged."""
    for kind, read in _READERS:
        try:
            found = read(content)
        except (ValueError, RuntimeError):
            return kind, None  # Load Concept says what is wrong with it
        if found:
            return kind, found
    return UNKNOWN, None


def _family_told(found: Found) -> Family | None:
    weights = {layer: DenseDelta(weight) for layer, weight in found.whole.items()} | found.deltas
    try:
        return family_of(found, {layer: weight.shape for layer, weight in weights.items()})
    except (ValueError, IndexError, IncompatibleModelError):
        return None  # nothing in the header tells
