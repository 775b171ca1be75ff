"""Any file of Custom Diffusion weights, LoRAs or embeddings as a Concept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..concept.checks import check_concept, check_sizes
from ..concept.concept import Concept, DenseDelta, ModifierToken
from ..concept.errors import ConceptFileError, CustomDiffusionError, IncompatibleModelError
from ..concept.file import concept_of
from ..concept.header import FORMAT, ConceptHeader
from ..concept.layers import FAMILIES, Family, family_of_width, is_projection
from ..concept.plain import plain_text
from ..concept.prompts import CONSTRAINT_TEMPLATES, subject
from .base import BaseModel
from .content import Content, read_content
from .custom_diffusion import read_a1111_delta, read_adobe, read_compvis, read_hugging_face
from .embeddings import read_embeddings
from .found import Found, Rows
from .lora import read_lora, read_mix_of_show

READERS: tuple[Callable[[Content], Found | None], ...] = (
    read_a1111_delta,
    read_compvis,
    read_adobe,
    read_mix_of_show,
    read_hugging_face,
    read_lora,
    read_embeddings,
)
"""Asked in this order; each answers None to what is not its own."""


@dataclass(frozen=True)
class Opened:
    """A concept, what kind of file it came from, and what of that file it does not hold."""

    concept: Concept
    title: str
    notes: tuple[str, ...] = ()
    foreign: bool = True


def open_concept(path: Path, base: BaseModel | None = None, class_noun: str = "") -> Opened:
    """Reads a concept file of ours or of any tool named in docs/formats.md.

    `base` is needed for files of whole matrices and for DoRA. `class_noun` belongs to the words of
    files that have none. Raises ConceptFileError, or IncompatibleModelError when the base is
    another.
    """
    content = read_content(path, judge=_found)
    found = _found(content)
    if found is None:
        concept = concept_of(path, content.tensors(), content.metadata)
        return Opened(concept, "a concept", foreign=False)
    try:
        concept = _concept(found, base, class_noun)
        check_concept(concept)
    except IncompatibleModelError as error:
        raise IncompatibleModelError(f"{path.name}, {found.title}: {error}") from error
    except (CustomDiffusionError, ValueError, RuntimeError) as error:
        raise ConceptFileError(f"{path.name}, {found.title}: {error}") from error
    provenance = {
        "imported_from": plain_text(path.name, len(path.name)),
        "format": found.title,
        "left_out": found.notes,
    }
    return Opened(replace(concept, provenance=provenance), found.title, tuple(found.notes))


def _found(content: Content) -> Found | None:
    """What is in another tool's file; None for a concept of ours. Raises ConceptFileError."""
    path = content.path
    if content.metadata.get("format") == FORMAT:
        ConceptHeader.of(path, content.metadata)
        return None
    try:
        found = next((found for reader in READERS if (found := reader(content))), None)
    except (ValueError, RuntimeError) as error:  # what a reader says of the file it knows
        raise ConceptFileError(f"{path.name}: {error}. Take another copy of the file.") from error
    if found is None:
        names = ", ".join(list(content.values)[:3]) or "nothing"
        raise ConceptFileError(
            f"{path.name} is no concept and nothing that can be made one: it holds {names}"
            f"{' and more' if len(content.values) > 3 else ''}. Custom Diffusion deltas, LoRAs of "
            f"cross-attention, and textual-inversion embeddings can be read."
        )
    return found


def _concept(found: Found, base: BaseModel | None, class_noun: str) -> Concept:
    deltas = dict(found.deltas)
    relative = bool(found.whole or found.magnitudes)
    if relative:
        if base is None:
            held = "whole weights" if found.whole else "a DoRA's directions and magnitudes"
            raise ConceptFileError(
                f"it holds {held}, not changes. Give the base model that it was trained on "
                f"(connect its MODEL, or --base), so that the changes can be told"
            )
        decomposed = base.decomposed(found.deltas, found.magnitudes)
        changes = base.changes(found.whole | decomposed)
        deltas |= {layer: DenseDelta(change) for layer, change in changes.items()}
    check_sizes({layer: delta.shape for layer, delta in deltas.items()})
    family = family_of(found, {layer: delta.shape for layer, delta in deltas.items()})
    if base is not None and base.family != family:
        raise IncompatibleModelError(
            f"The file is of {family.title} and the base model given is {base.family.title}. Give "
            f"a base model of {family.title}."
        )
    tokens = tuple(
        ModifierToken(name, class_noun, _by_encoder(name, embeddings, family))
        for name, embeddings in found.tokens.items()
    )
    prompts = [
        t.format(subject(k.name, k.class_noun)) for k in tokens for t in CONSTRAINT_TEMPLATES
    ]
    known = base.hash if base is not None and relative else ""
    return Concept(family, deltas, tokens, base_hash=known, constraint_prompts=tuple(prompts))


def family_of(found: Found, shapes: dict[str, tuple[int, int]]) -> Family:
    """From what the projections read, else from the widths of the embeddings."""
    widths = {shape[1] for layer, shape in shapes.items() if is_projection(layer)}
    if len(widths) == 1:
        return family_of_width(widths.pop())
    if widths:
        raise ValueError(f"its projections read text features of different widths, {widths}")
    if shapes:
        raise ValueError("it changes queries and outputs alone, which is no concept")
    rows = {frozenset(embeddings) for embeddings in found.tokens.values()}
    for family in FAMILIES.values():
        if rows == {frozenset(family.text_encoders.values())}:
            return family
    given = sorted({width for widths in rows for width in widths})
    raise ValueError(f"it has no cross-attention, and embeddings of the widths {given}")


def _by_encoder(name: str, embeddings: Rows, family: Family) -> dict[str, Tensor]:
    missing = [e for e, width in family.text_encoders.items() if width not in embeddings]
    if missing:
        raise ValueError(
            f"the word {name} has embeddings of the widths {sorted(embeddings)}, "
            f"{family.title} needs {sorted(family.text_encoders.values())}"
        )
    return {
        encoder: embeddings[width].to(torch.promote_types(embeddings[width].dtype, torch.float16))
        for encoder, width in family.text_encoders.items()
    }
