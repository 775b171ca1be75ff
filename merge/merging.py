"""Merging concepts: constraint rows, the shared projector, and two thin products a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..concept.concept import Concept, ModifierToken, alike_tokens
from ..concept.delta import Delta, LowRankDelta
from ..concept.errors import IncompatibleModelError, MergeError
from ..concept.fit import TEXT_MARK
from ..concept.layers import Family, is_projection, sort_layers
from ..concept.text import TextEncoder, text_mark
from .caption_cache import cached_caption_factor
from .captions import regularization_captions
from .projector import Projector, constraint_projector
from .report import MergeReport
from .rows import (
    ConstraintRow,
    concept_prompts,
    conflicts,
    constraint_features,
    group_rows,
    shared_rows,
)

DEFAULT_RELATIVE_RIDGE = 1e-4


def merge_concepts(
    concepts: Sequence[Concept],
    encoder: TextEncoder,
    *,
    strengths: Sequence[float] | None = None,
    captions: Sequence[str] | None = None,
    relative_ridge: float = DEFAULT_RELATIVE_RIDGE,
    cache_folder: Path | None = None,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> tuple[Concept, MergeReport]:
    """Merges concepts by constrained least squares (Custom Diffusion, Eq. 4-5).

    The result is again a concept, exactly low rank, with every modifier token of its parents. The
    order of the concepts does not matter. `strengths` scale what each concept asks for (1 when not
    given); `captions` replace our own regularization captions; their factor is kept in
    `cache_folder`.

    Raises MergeError, IncompatibleModelError or TokenError; inputs are never changed.
    """
    strengths = [1.0] * len(concepts) if strengths is None else list(strengths)
    tokens = check_mergeable(concepts, strengths)
    _check_encoder(concepts[0].family, encoder)
    captions = regularization_captions() if captions is None else list(captions)
    if not captions:
        raise MergeError(
            "The list of regularization captions is empty. Give some, or leave it out."
        )

    words = encoder.with_tokens(replace(concepts[0], tokens=tokens).embeddings())
    rows, features = constraint_features(concepts, words)
    factor = cached_caption_factor(
        encoder, captions, relative_ridge, cache_folder, lambda part: on_progress(0.9 * part)
    )
    groups = group_rows(features)
    shared, mixing = shared_rows(rows, features, groups, strengths)
    still = torch.tensor([all(rows[i].still for i in group) for group in groups])
    projector = constraint_projector(factor, shared, still)
    mixing = mixing[:, ~still]
    on_progress(0.9)

    deltas, residuals = merged_deltas(concepts, strengths, rows, features, mixing, projector)
    on_progress(1.0)

    merged = Concept(
        family=concepts[0].family,
        deltas=deltas,
        tokens=tokens,
        base_hash=next((c.base_hash for c in concepts if c.base_hash), ""),
        constraint_prompts=tuple(
            prompt for concept in concepts for prompt in concept_prompts(concept)
        ),
        provenance={
            "method": "constrained least squares merge",
            "strengths": strengths,
            "parents": [dict(concept.provenance) for concept in concepts],
            TEXT_MARK: text_mark(encoder),
        },
        scope="own words" if all(c.scope == "own words" for c in concepts) else "every word",
    )
    report = MergeReport(
        rows=tuple(rows),
        shared_rows=mixing.shape[1],
        conflicts=tuple(conflicts(rows, groups, residuals)),
        condition=projector.condition,
        damped=projector.damped,
        residuals=tuple(residuals),
        change=_norm(merged) / max(max(_norm(concept) for concept in concepts), 1e-30),
        captions=factor.captions,
        alike=tuple(alike_tokens(tokens)),
    )
    return merged, report


def merged_deltas(
    concepts: Sequence[Concept],
    strengths: Sequence[float],
    rows: Sequence[ConstraintRow],
    features: Tensor,
    mixing: Tensor,
    projector: Projector,
) -> tuple[dict[str, Delta], list[float]]:
    """ΔW = E P of every layer as factors (E · left, rows), and each concept's largest residual.

    `mixing` (rows, s) gathers what the concepts ask for on equal rows. All layers stand side by
    side, and nothing of size (o, d) is ever built. The residual of a row is ‖ΔW c − a D c‖ / ‖D c‖
    over all layers, at strength a.
    """
    sizes = {layer: delta.shape[0] for c in concepts for layer, delta in c.deltas.items()}
    layers = sort_layers(sizes)
    down = projector.rows.float()
    up = torch.zeros(sum(sizes.values()), len(down))
    parts = []
    for index, concept in enumerate(concepts):
        own = [i for i, row in enumerate(rows) if row.concept == index and not row.still]
        words = features[own].float()
        asked = torch.cat([_asked(concept, layer, words, sizes[layer]) for layer in layers], dim=1)
        up.addmm_(asked.T, (mixing[own] @ projector.left).float())
        parts.append((words, asked))
    residuals = [
        _largest_residual((words @ down.T) @ up.T, asked, strength)
        for (words, asked), strength in zip(parts, strengths, strict=True)
    ]
    ups = up.split([sizes[layer] for layer in layers])
    return {
        layer: LowRankDelta(part, down) for layer, part in zip(layers, ups, strict=True)
    }, residuals


def _asked(concept: Concept, layer: str, words: Tensor, size: int) -> Tensor:
    """D Cᵀ, transposed (s, o): what a concept adds to the projections of its words."""
    delta = concept.deltas.get(layer)
    return words.new_zeros(len(words), size) if delta is None else delta.map_rows(words)


def _largest_residual(mapped: Tensor, asked: Tensor, strength: float) -> float:
    error = (mapped - strength * asked).norm(dim=1)
    size = asked.norm(dim=1)
    return float(torch.where(size > 0, error / size, 0.0).max())


def _norm(concept: Concept) -> float:
    """Frobenius norm over all layers."""
    return math.sqrt(sum(delta.squared_norm() for delta in concept.deltas.values()))


def check_mergeable(
    concepts: Sequence[Concept], strengths: Sequence[float]
) -> tuple[ModifierToken, ...]:
    """The words of the merge. What is wrong with the concepts shows here, before a model is loaded
    or captions are encoded: raises MergeError, IncompatibleModelError or TokenError.
    """
    if not concepts:
        raise MergeError("No concept was given to merge. Connect at least two.")
    if len(strengths) != len(concepts):
        raise MergeError(
            f"{len(strengths)} strengths were given for {len(concepts)} concepts. Give one for "
            "each."
        )
    family = concepts[0].family
    for concept in concepts:
        if concept.family != family:
            raise IncompatibleModelError(
                f"The concepts belong to different models: {concepts[0].describe()} and "
                f"{concept.describe()}. Merge concepts that were trained on the same base model."
            )
        others = [layer for layer in concept.layers if not is_projection(layer)]
        if others:
            raise MergeError(
                f"The concept {concept.describe()} changes more than keys and values "
                f"({len(others)} matrices, {others[0]} for one), and only these can be merged in "
                f"closed form. Train it by 'custom diffusion' or 'low-rank'."
            )
        if not concept_prompts(concept):
            raise MergeError(
                f"The concept {concept.describe()} names no word to keep: it has no trigger word "
                "and no prompts of its own. Train it again with a trigger word."
            )
    hashes = {concept.base_hash for concept in concepts if concept.base_hash}
    if len(hashes) > 1:
        raise IncompatibleModelError(
            f"The concepts were trained on different {family.title} checkpoints "
            f"(base hashes {', '.join(sorted(h[:8] for h in hashes))}). Train them on the same one."
        )
    tokens = tuple(token for concept in concepts for token in concept.tokens)
    return replace(concepts[0], tokens=tokens).tokens  # made, so that two of one name show


def _check_encoder(family: Family, encoder: TextEncoder) -> None:
    if encoder.context_width != family.context_width:
        raise IncompatibleModelError(
            f"The concepts were trained on {family.title} (text width {family.context_width}); the "
            f"CLIP given has width {encoder.context_width}. Connect the CLIP of the concepts' own "
            "base model."
        )
