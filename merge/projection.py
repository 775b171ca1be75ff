"""A concept as the closed form of itself: Eq. 5 with one concept.

It acts at its own words as before and hardly elsewhere, in whatever loads it. Its rank is the
number of its constraint rows: a hundredth of the size of a dense concept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..concept.concept import Concept
from ..concept.fit import TEXT_MARK
from ..concept.text import TextEncoder
from .merging import DEFAULT_RELATIVE_RIDGE, merge_concepts
from .report import MergeReport


def project_on_own_words(
    concept: Concept,
    encoder: TextEncoder,
    *,
    captions: Sequence[str] | None = None,
    relative_ridge: float = DEFAULT_RELATIVE_RIDGE,
    cache_folder: Path | None = None,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> tuple[Concept, MergeReport]:
    """The smallest change, measured on captions, that maps the concept's words as it does.

    Everything else about the concept stays. Arguments and errors are those of `merge_concepts`.
    """
    projected, report = merge_concepts(
        [concept],
        encoder,
        captions=captions,
        relative_ridge=relative_ridge,
        cache_folder=cache_folder,
        on_progress=on_progress,
    )
    provenance = {
        **concept.provenance,
        "projected_on_rows": report.shared_rows,
        TEXT_MARK: projected.provenance[TEXT_MARK],
    }
    return replace(concept, deltas=projected.deltas, provenance=provenance), report
