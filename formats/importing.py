"""Any file of Custom Diffusion weights, LoRAs or embeddings as a Concept."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..concept.checks import check_concept, check_sizes
from ..concept.concept import Concept, ModifierToken
from ..concept.delta import Delta, DenseDelta
from ..concept.errors import ConceptFileError, CustomDiffusionError, IncompatibleModelError
from ..concept.file import concept_of
from ..concept.header import FORMAT, ConceptHeader
from ..concept.layers import FAMILIES, Family, family_of_width, is_projection
from ..concept.plain import plain_text
from ..concept.prompts import CONSTRAINT_TEMPLATES, subject
from .base import BaseModel
from .content import Content, read_content
from .custom_diffusion import (
    read_a1111_delta,
    read_adobe,
    read_compvis,
    read_hugging_face,
    word_files,
)
from .embeddings import read_embeddings
from .found import Found, Rows
from .lora import read_lora, read_mix_of_show
from .peft import CONFIG

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


_STRANGERS = tuple(
    (re.compile(names), what)
    for names, what in {
        r"^(control_model\.|controlnet_|input_hint_block)": "a ControlNet",
        r"^(ip_adapter|image_proj)": "an IP-Adapter",
        r"^unet:\d+:(up|down)$": "a LoRA of the first script for it, whose layers have no names,",
        r"(^|\.)attn2\.(processor\.)?to_[kvq]\.weight$": "a whole UNet or checkpoint (give it as "
        "the base model, or load it with ComfyUI's own nodes)",
        r"^(first_stage_model|encoder|decoder)\.": "an autoencoder (VAE)",
    }.items()
)
"""What else files of weights are, by a name in them; the first that fits is said"""


@dataclass(frozen=True)
class Opened:
    """A concept, what kind of file it came from, and what of that file it does not hold."""

    concept: Concept
    title: str
    notes: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    """How much of the file is in the concept, and how far it was from the base model given"""
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
        every, used = found.account(content.tensor_paths())
        concept, moved = _concept(found, base, class_noun)
        check_concept(concept)
    except IncompatibleModelError as error:
        raise IncompatibleModelError(f"{path.name}, {found.title}: {error}") from error
    except (CustomDiffusionError, ValueError, RuntimeError) as error:
        raise ConceptFileError(f"{path.name}, {found.title}: {error}") from error
    if concept.deltas and all(delta.is_zero() for delta in concept.deltas.values()):
        found.notes.append("its changes are all 0, so it does nothing to a model")
    provenance: dict[str, Any] = {
        "imported_from": plain_text(path.name, len(path.name)),
        "format": found.title,
        "left_out": found.notes,
    }
    facts = [f"{used} of the {every} tensors in the file are used"]
    if moved is not None:
        provenance["distance_from_base"] = moved
        facts.append(
            f"its weights differ from the base model given by {moved:.1%} of their norm; training "
            f"moves them by a few per cent, another fine-tune of the base by more"
        )
    concept = replace(concept, provenance=provenance)
    return Opened(concept, found.title, tuple(found.notes), tuple(facts))


def companions(path: Path) -> list[Path]:
    """Files beside `path` that opening it may read too: whoever remembers what it opened has to
    look at them as well.
    """
    return [path.parent / CONFIG, *word_files(path)]


def _found(content: Content) -> Found | None:
    """What is in another tool's file; None for a concept of ours. Raises ConceptFileError."""
    path = content.path
    if content.metadata.get("format") == FORMAT:
        ConceptHeader.of(path, content.metadata)
        return None
    try:
        found = _first(content)
    except (ValueError, RuntimeError) as error:  # what a reader says of the file it knows
        raise ConceptFileError(
            f"{path.name}: {error}. Take another copy of the file, or ask for it in another format."
        ) from error
    if found is None:
        names = ", ".join(list(content.values)[:3]) or "nothing"
        known = next((what for at, what in _STRANGERS if any(map(at.search, content.values))), "")
        raise ConceptFileError(
            f"{path.name} is {known or 'no concept'} and nothing that can be made one: it holds "
            f"{names}{' and more' if len(content.values) > 3 else ''}. Custom Diffusion deltas, "
            f"LoRAs of cross-attention, and textual-inversion embeddings can be read."
        )
    return found


def _first(content: Content) -> Found | None:
    """What the first reader that knows the file finds in it; some tools put all of a LoRA into a
    container.
    """
    found = next((found for reader in READERS if (found := reader(content))), None)
    inner = content.part("state_dict")
    if found is None and inner:
        found = _first(replace(content, values=inner))
        if found is not None:
            found.used = {f"state_dict/{path}" for path in found.used}
            found.left = {f"state_dict/{path}" for path in found.left}
    return found


def _concept(found: Found, base: BaseModel | None, class_noun: str) -> tuple[Concept, float | None]:
    """The concept, and how far its whole weights are from the base's."""
    deltas: dict[str, Delta] = dict(found.deltas)
    moved = None
    if found.relative:
        if base is None:
            kinds = sorted({one.kind for one in found.relative.values()})
            raise ConceptFileError(
                f"it holds {' and '.join(kinds)}, not changes. Give the base model that it was "
                f"trained on (connect its MODEL, or --base), so that the changes can be told"
            )
        changes, moved = base.changes(found.relative)
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
    known = base.hash if base is not None and found.relative else ""
    concept = Concept(family, deltas, tokens, base_hash=known, constraint_prompts=tuple(prompts))
    return concept, moved


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
    needed = ", ".join(
        f"{' and '.join(map(str, family.text_encoders.values()))} ({family.title})"
        for family in FAMILIES.values()
    )
    raise ValueError(
        f"it changes no cross-attention of Stable Diffusion, and its embeddings have the widths "
        f"{given}; {needed} are needed"
        if given
        else "it changes no cross-attention of Stable Diffusion and has no word, so there is "
        f"nothing that a concept could hold: {'; '.join(found.notes) or 'it is empty'}"
    )


def _by_encoder(name: str, embeddings: Rows, family: Family) -> dict[str, Tensor]:
    if embeddings.keys() != {*family.text_encoders.values()}:
        raise ValueError(
            f"the word {name} has embeddings of the widths {sorted(embeddings)}, "
            f"{family.title} needs {sorted(family.text_encoders.values())}"
        )
    if len({len(rows) for rows in embeddings.values()}) > 1:
        raise ValueError(
            f"the word {name} has {' and '.join(str(len(rows)) for rows in embeddings.values())} "
            "vectors for the text encoders, which need as many each"
        )
    return {
        encoder: embeddings[width].to(torch.promote_types(embeddings[width].dtype, torch.float16))
        for encoder, width in family.text_encoders.items()
    }
