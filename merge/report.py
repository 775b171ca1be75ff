"""What a merge did, for reading and for deciding whether to trust it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from .rows import ConstraintRow

LARGE_RESIDUAL = 0.1
"""A concept whose words are missed by more than this share deserves a warning."""
LARGE_CHANGE = 5.0
"""A merge that changes the model this many times more than its largest concept deserves one too."""


@dataclass(frozen=True)
class MergeReport:
    """Figures of one merge."""

    rows: tuple[ConstraintRow, ...]
    shared_rows: int
    """Constraint rows that are taught, after rows with equal features became one: the rank."""
    conflicts: tuple[str, ...]
    condition: float
    damped: bool
    residuals: tuple[float, ...]
    """Largest relative error on each concept's constrained words."""
    change: float
    """‖ΔW‖ of the merge over the largest ‖ΔW‖ of a single concept."""
    captions: int

    def summary(self) -> tuple[str, str]:
        """How the rows were kept, and how much that changes."""
        exact = "damped" if self.damped else "exact"
        soft, still = sum(row.soft for row in self.rows), sum(row.still for row in self.rows)
        softly = f" and {soft} rows of padding, softly" if soft else ""
        staying = f"; {still} rows of bare class nouns stay" if still else ""
        return (
            f"{len(self.rows) - soft - still} constraint rows{softly}, {self.shared_rows} "
            f"different{staying}; "
            f"{exact} (condition {self.condition:.3g}); {self.captions} regularization captions",
            f"change of the model: {self.change:.2f} times its largest concept's",
        )

    def kept(self, concept: int) -> dict[str, int]:
        """Prompt → how many of its rows are kept for a concept, counted from 0."""
        own = (row for row in self.rows if row.concept == concept and not row.still)
        return dict(Counter(row.prompt for row in own))

    def warnings(self) -> Iterator[str]:
        yield from (f"conflict: {conflict}" for conflict in self.conflicts)
        if max(self.residuals) > LARGE_RESIDUAL:
            yield (
                "warning: the concepts' words are too alike to keep each exactly. Give them other "
                "class nouns or modifier tokens, or train the concepts together."
            )
        if self.change > LARGE_CHANGE:
            yield (
                "warning: the concepts' words are hard to tell apart, so the merge changes the "
                "model a lot. Check pictures of the bare class nouns, or train the concepts "
                "together."
            )

    def lines(self) -> Iterator[str]:
        rows, change = self.summary()
        yield rows
        for index, residual in enumerate(self.residuals):
            yield f"concept {index + 1}: largest error on its own words {residual:.2%}"
        yield change
        yield from self.warnings()

    def text(self) -> str:
        return "\n".join(self.lines())
