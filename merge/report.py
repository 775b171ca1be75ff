"""What a merge did: a verdict that anybody can read, what to do, and the figures behind it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .rows import ConstraintRow

LARGE_RESIDUAL = 0.1
"""A concept whose words are missed by more than this share deserves a warning."""
SMALL_RESIDUAL = 0.01
"""Up to here nobody sees a difference."""
_KEPT_EXACTLY = 1e-3
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
    alike: tuple[tuple[str, str], ...] = ()
    """Modifier tokens that are one to the text encoder"""

    def verdict(self) -> str:
        """Whether to be content, for somebody who reads nothing else."""
        numbers = enumerate(self.residuals, start=1)
        lost = [f"concept {number}" for number, error in numbers if error > LARGE_RESIDUAL]
        if lost:
            names, its = " and ".join(lost).capitalize(), "its" if len(lost) == 1 else "their"
            looks = f"{names} lost some of {its} look."
        else:
            count = len(self.residuals)
            all_of_them = {1: "The concept keeps its", 2: "Both concepts keep their"}.get(
                count, f"All {count} concepts keep their"
            )
            nearly = ", nearly" if max(self.residuals) > SMALL_RESIDUAL else ""
            looks = f"{all_of_them} look{nearly}."
        if self.change > LARGE_CHANGE:
            return f"{looks} The rest of the model changed a lot."
        return f"{looks} Nothing else changed."

    def summary(self) -> tuple[str, str]:
        """The verdict, and the figures behind it."""
        return self.verdict(), f"details: {'; '.join(self._details())}"

    def _details(self) -> tuple[str, str]:
        exact = "damped" if self.damped else "exact"
        still = sum(row.still for row in self.rows)
        staying = f"; {still} rows of bare class nouns stay" if still else ""
        return (
            f"{len(self.rows) - still} constraint rows, {self.shared_rows} different{staying}; "
            f"{exact} (condition {self.condition:.3g}); {self.captions} regularization captions",
            f"change of the model: {self.change:.2f} times its largest concept's",
        )

    def kept(self, concept: int) -> tuple[str, ...]:
        """The prompts that are kept for a concept, counted from 0."""
        own = (row for row in self.rows if row.concept == concept and not row.still)
        return tuple(dict.fromkeys(row.prompt for row in own))

    def warnings(self) -> Iterator[str]:
        yield from (f"conflict: {conflict}" for conflict in self.conflicts)
        # A concept under two names is no harm: it is kept exactly.
        for one, other in self.alike if max(self.residuals) > _KEPT_EXACTLY else ():
            yield (
                f"warning: {one} and {other} are the same to the text encoder, so a prompt cannot "
                f"tell them apart, whatever they are called. Train one of them again from another "
                f"initializer, and not by 'dreambooth', whose words stay where they start."
            )
        if max(self.residuals) > LARGE_RESIDUAL:
            yield (
                "warning: the concepts' words are too alike to keep each look. Give them other "
                "class nouns or trigger words, or train the concepts together."
            )
        if self.change > LARGE_CHANGE:
            yield (
                "warning: the concepts' words are hard to tell apart, so other words changed too. "
                "Draw a few pictures with the class nouns alone; if they look wrong, use Route "
                "Concepts in place of the merge, or train the concepts together."
            )

    def lines(self) -> Iterator[str]:
        yield self.verdict()
        yield from self.warnings()
        yield ""
        yield "details"
        rows, change = self._details()
        yield rows
        for index, residual in enumerate(self.residuals):
            yield f"concept {index + 1}: largest error on its own words {residual:.2%}"
        yield change

    def text(self) -> str:
        return "\n".join(self.lines())
