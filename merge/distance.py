"""How close concepts lie, before a merge is tried: what they share cannot be told apart in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from ..concept.concept import Concept
from ..concept.text import TextEncoder
from .caption_cache import cached_caption_factor
from .captions import regularization_captions
from .merging import DEFAULT_RELATIVE_RIDGE, check_mergeable
from .projector import EXACT_CONDITION_LIMIT, CaptionFactor
from .rows import constraint_features

CLOSE = 0.9
"""Overlap from which on two concepts are called close: a condition above 4"""
_INDEPENDENT = 1e-6
"""Directions of a concept's rows that are weaker than this, relative to the strongest, count not"""


@dataclass(frozen=True)
class PairDistance:
    """Of two concepts, counted from 0."""

    first: int
    second: int
    words: float
    """Largest cosine of their trigger words' vectors; NaN where one has none"""
    overlap: float
    """Largest cosine between what their constraint rows span, in the metric that a merge measures
    changes by, G⁻¹: 0 for concepts that know nothing of each other, 1 for a row that both have
    """

    @property
    def condition(self) -> float:
        """Of the two directions that are nearest; a merge is damped from 30 on."""
        return math.sqrt((1 + self.overlap) / max(1 - self.overlap, 1e-12))

    def verdict(self) -> str:
        if self.condition > EXACT_CONDITION_LIMIT:
            return (
                "nearly one: a merge may cost one of them some of its look. Give them other "
                "trigger words or class nouns, or use Route Concepts."
            )
        if self.overlap > CLOSE:
            return "close: a merge works, but changes other words more. Look at its report."
        return "far apart: they merge well."


def distance_table(
    pairs: Sequence[PairDistance], names: Sequence[str]
) -> list[tuple[str, str, str, str]]:
    """A row a pair, below a head."""
    rows = [
        (
            f"{names[p.first]} and {names[p.second]}",
            f"{p.words:.2f}",
            f"{p.overlap:.3f}",
            p.verdict(),
        )
        for p in pairs
    ]
    return [("concepts", "trigger words", "overlap", "verdict"), *rows]


@torch.no_grad()
def concept_distances(
    concepts: Sequence[Concept],
    encoder: TextEncoder,
    *,
    captions: Sequence[str] | None = None,
    relative_ridge: float = DEFAULT_RELATIVE_RIDGE,
    cache_folder: Path | None = None,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> list[PairDistance]:
    """Of every two concepts. Arguments and errors are those of `merge_concepts`."""
    tokens = check_mergeable(concepts, [1.0] * len(concepts))
    words = encoder.with_tokens(replace(concepts[0], tokens=tokens).embeddings())
    rows, features = constraint_features(concepts, words)
    captions = regularization_captions() if captions is None else list(captions)
    factor = cached_caption_factor(encoder, captions, relative_ridge, cache_folder, on_progress)
    bases = [
        _basis(features[[i for i, r in enumerate(rows) if r.concept == n and not r.still]], factor)
        for n in range(len(concepts))
    ]
    return [
        PairDistance(
            one,
            other,
            _word_cosine(concepts[one], concepts[other]),
            min(1.0, float(torch.linalg.matrix_norm(bases[one] @ bases[other].T, 2))),
        )
        for one, other in combinations(range(len(concepts)), 2)
    ]


def _basis(rows: Tensor, factor: CaptionFactor) -> Tensor:
    """Orthonormal directions (r, d) of Z = C R⁻¹."""
    z = torch.linalg.solve_triangular(factor.upper, rows.double(), upper=True, left=False)
    _, singular, vh = torch.linalg.svd(z, full_matrices=False)
    basis: Tensor = vh[singular > _INDEPENDENT * singular[0]]
    return basis


def _word_cosine(one: Concept, other: Concept) -> float:
    found = [
        float(torch.cosine_similarity(a.float()[:, None], b.float()[None], dim=-1).max())
        for first in one.tokens
        for second in other.tokens
        for a, b in (
            (vectors, second.embeddings[name]) for name, vectors in first.embeddings.items()
        )
    ]
    return max(found, default=math.nan)
