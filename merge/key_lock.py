"""Key-locking: a concept's words look where its class noun looks, and bring what they have learnt.

After Perfusion (Tewel et al., SIGGRAPH 2023, arXiv 2305.01644), whose rank-one key lock is Eq. 5
with the class noun's keys as targets: with the rows C of the concept's words and Δ from each to the
class noun's row in the same prompt without the trigger word,

    W^K = W₀^K + W₀^K Δᵀ P,   P = (C G⁻¹ Cᵀ)⁻¹ C G⁻¹

What the concept had learnt of keys is dropped. Its values stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..concept.concept import Concept
from ..concept.delta import LowRankDelta
from ..concept.errors import MergeError
from ..concept.fit import TEXT_MARK, check_fit, check_text_width
from ..concept.layers import is_projection
from ..concept.prompts import own_positions
from ..concept.text import TextEncoder, encode_unpadded, text_mark
from .caption_cache import cached_caption_factor
from .captions import regularization_captions
from .merging import DEFAULT_RELATIVE_RIDGE
from .projector import constraint_projector
from .rows import ConstraintRow, constraint_features, group_rows

_KEYS = "attn2.to_k"


@dataclass(frozen=True)
class KeyLockReport:
    """What was locked, and how well."""

    rows: int
    rank: int
    missed: float
    """Largest ‖W c − W₀ c_class‖ / ‖W₀ c − W₀ c_class‖ over the concept's rows"""
    condition: float
    damped: bool

    def summary(self) -> tuple[str, str]:
        how = "damped" if self.damped else "exact"
        return (
            "The concept's words look where its class noun looks.",
            f"details: {self.rows} rows of keys, rank {self.rank}; {how} (condition "
            f"{self.condition:.3g}); at most {self.missed:.1%} of the way missed",
        )


@torch.no_grad()
def lock_keys(
    concept: Concept,
    weights: Mapping[str, Tensor],
    encoder: TextEncoder,
    *,
    captions: Sequence[str] | None = None,
    relative_ridge: float = DEFAULT_RELATIVE_RIDGE,
    cache_folder: Path | None = None,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> tuple[Concept, KeyLockReport]:
    """The concept with the keys of its class noun; `weights` are the base model's by layer name.

    Bare class nouns and the start of text stay. Raises MergeError for a concept without a trigger
    word or class noun, IncompatibleModelError where concept, model and text encoder do not go
    together.
    """
    _check(concept, weights, encoder)
    rows, features = constraint_features([concept], encoder.with_tokens(concept.embeddings()))
    own = [i for i, row in enumerate(rows) if not row.still]
    targets = _class_rows(concept, [rows[i] for i in own], encoder)
    still = torch.cat([targets, _empty(encoder)])
    everything = torch.cat([features[own], still])
    moves = torch.cat([targets - features[own], torch.zeros_like(still)])
    staying = torch.arange(len(everything)) >= len(own)
    groups = group_rows(everything)
    shared = torch.stack([everything[group].mean(0) for group in groups])
    delta = torch.stack([moves[group].mean(0) for group in groups])
    stays = torch.tensor([bool(staying[group].any()) for group in groups])

    captions = regularization_captions() if captions is None else list(captions)
    factor = cached_caption_factor(
        encoder, captions, relative_ridge, cache_folder, lambda part: on_progress(0.9 * part)
    )
    projector = constraint_projector(factor, shared, stays)
    move = (delta[~stays].T @ projector.left).float()
    down = projector.rows.float()
    keys = {
        layer: LowRankDelta(weight.to("cpu").float() @ move, down)
        for layer, weight in weights.items()
        if layer.endswith(_KEYS)
    }
    reached = features[own].float() @ down.T @ move.T
    asked = (targets - features[own]).float()
    missed = (reached - asked).norm(dim=1) / asked.norm(dim=1).clamp(min=1e-30)
    locked = replace(
        concept,
        deltas={**concept.deltas, **keys},
        provenance={**concept.provenance, "keys": "locked", TEXT_MARK: text_mark(encoder)},
    )
    on_progress(1.0)
    report = KeyLockReport(
        len(own), len(down), float(missed.max()), projector.condition, projector.damped
    )
    return locked, report


def _class_rows(concept: Concept, rows: Sequence[ConstraintRow], encoder: TextEncoder) -> Tensor:
    """For each row what the base model has there without the trigger word: for the word itself the
    class noun's last piece, for all behind it the same piece, (s, d) in float64.
    """
    known = encoder.with_tokens(concept.embeddings())
    found = []
    for row in rows:
        token = next(token for token in concept.tokens if token.name in row.prompt)
        word, noun = known.tokenize_words(token.name), known.tokenize_words(token.class_noun)
        ids = known.tokenize(row.prompt)
        start = own_positions(ids, word, [])[0]
        bare_ids = [*ids[:start], *ids[start + len(word) :]]
        (bare,) = encode_unpadded(encoder, [bare_ids])
        inside = row.position < start + len(word)
        at = start + len(noun) - 1 if inside else row.position - len(word)
        found.append(bare[at])
    return torch.stack(found).double().cpu()


def _empty(encoder: TextEncoder) -> Tensor:
    (rows,) = encode_unpadded(encoder, [encoder.tokenize("")])
    return rows.double().cpu()


def _check(concept: Concept, weights: Mapping[str, Tensor], encoder: TextEncoder) -> None:
    shapes = {layer: tuple(weight.shape) for layer, weight in weights.items()}
    check_fit(concept, concept.family, shapes)
    check_text_width(encoder.context_width, concept.family)
    without = [token.name for token in concept.tokens if not token.class_noun]
    if not concept.tokens or without:
        raise MergeError(
            f"The concept {concept.describe()} has no "
            f"{'class noun for ' + without[0] if without else 'trigger word'}, so there are no "
            "keys to lock it to. Give it one: class_noun of Load Concept."
        )
    if not any(is_projection(layer) and layer.endswith(_KEYS) for layer in weights):
        raise MergeError("The model given has no keys of cross-attention. Load its checkpoint.")
