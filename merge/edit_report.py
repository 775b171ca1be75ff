"""What an edit did: to its words, to those that should stay, and to their neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from .edit_rows import EditRows
from .edits import Edit
from .projector import Projector

LARGE_MOVE = 0.1
"""A word that nobody named and that moves by more deserves a warning."""
_NOT_REACHED = 0.1
_STAYS = 1e-3


@dataclass(frozen=True)
class Moved:
    """Figures over all layers' keys and values together."""

    words: Tensor
    """(n,) ‖ΔW c‖ / ‖W₀ c‖ of each watched word"""
    missed: Tensor
    """(s,) ‖ΔW c − W₀ Δ‖ / ‖W₀ Δ‖ of each edited row"""


@dataclass(frozen=True)
class EditReport:
    """Words with how far their keys and values moved, as a share of what they were."""

    edited: tuple[tuple[Edit, float, float], ...] = ()
    """The edit, how far its word moved, and the largest part of the way that was missed"""
    preserved: tuple[tuple[str, float], ...] = ()
    neighbours: tuple[tuple[str, float], ...] = ()
    """Of words that nobody named, those that moved most, most first"""
    split: tuple[tuple[str, int], ...] = ()
    """Words that the text encoder reads as several pieces"""
    rank: int = 0
    condition: float = 1.0
    damped: bool = False
    captions: int = 0

    def verdict(self) -> str:
        if not self.edited:
            return "Every word is restored: this is the base model."
        missed = [edit.word for edit, _, part in self.edited if part > _NOT_REACHED]
        if missed:
            return f"{_named(missed)} did not get all the way: other words hold on to the old look."
        count = len(self.edited)
        return "The word means what you asked." if count == 1 else f"All {count} words changed."

    def lines(self) -> Iterator[str]:
        """A fact each."""
        for edit, moved, missed in self.edited:
            yield f"{edit.says()}: moved by {moved:.0%}, {1 - missed:.0%} of the way"
        for word, moved in self.preserved:
            yield f"'{word}' preserved: moved by {moved:.1%}"
        for word, moved in self.neighbours:
            if moved > _STAYS:
                yield f"'{word}', which nobody named, moved by {moved:.1%}"

    def warnings(self) -> list[str]:
        far = [(word, moved) for word, moved in self.neighbours if moved > LARGE_MOVE]
        return [*self._split(), *self._held(), *self._far(far)]

    def details(self) -> str:
        how = "damped" if self.damped else "exact"
        return (
            f"rank {self.rank}; {how} (condition {self.condition:.3g}); {self.captions} "
            f"regularization captions"
        )

    def table(self) -> list[tuple[str, str, str]]:
        """A row a word, below a head."""
        rows = [
            *((edit.says(), f"{moved:.1%}", f"{1 - m:.1%}") for edit, moved, m in self.edited),
            *((f"'{word}' preserved", f"{moved:.1%}", "") for word, moved in self.preserved),
            *((f"'{word}'", f"{moved:.1%}", "") for word, moved in self.neighbours),
        ]
        return [("word", "moved", "of the way"), *rows]

    def text(self) -> str:
        return "\n".join([self.verdict(), *self.warnings(), "", *self.lines(), self.details()])

    def _split(self) -> Iterator[str]:
        for word, pieces in self.split:
            yield (
                f"warning: the text encoder reads '{word}' as {pieces} pieces. Only what the last "
                "one says is edited or preserved, and longer words that end so may change too."
            )

    def _held(self) -> Iterator[str]:
        moved = [word for word, share in self.preserved if share > LARGE_MOVE]
        if moved:
            yield (
                f"warning: {_named(moved)} should stay and moved all the same: too near to an "
                "edited word, or the softness is too high."
            )

    def _far(self, far: Sequence[tuple[str, float]]) -> Iterator[str]:
        if far:
            edited = _named([edit.word for edit, _, _ in self.edited])
            moved = ", ".join(f"'{word}' by {share:.0%}" for word, share in far[:4])
            more = f" and {len(far) - 4} more" if len(far) > 4 else ""
            yield (
                f"warning: editing {edited} moved {moved}{more}. Preserve those that you need, or "
                "edit by a smaller share."
            )


def report_of(
    edits: Sequence[Edit],
    preserved: Sequence[str],
    neighbours: Sequence[str],
    moved: Moved,
    rows: EditRows,
    *,
    split: Sequence[tuple[str, int]],
    projector: Projector,
    captions: int,
) -> EditReport:
    """From figures in one order: of the edits' words, of what is preserved, of the neighbours."""
    shares = moved.words.tolist()
    owners = rows.edits[~rows.still]
    missed = [float(moved.missed[owners == index].max()) for index in range(len(edits))]
    count = len(edits)
    after = count + len(preserved)
    return EditReport(
        edited=tuple(zip(edits, shares[:count], missed, strict=True)),
        preserved=tuple(zip(preserved, shares[count:after], strict=True)),
        neighbours=tuple(
            sorted(zip(neighbours, shares[after:], strict=True), key=lambda one: -one[1])
        ),
        split=tuple(split),
        rank=len(projector.rows),
        condition=projector.condition,
        damped=projector.damped,
        captions=captions,
    )


def _named(words: Sequence[str]) -> str:
    return " and ".join(f"'{word}'" for word in words)
