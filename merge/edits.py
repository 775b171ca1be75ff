"""What can be asked of a model's words: each edit is one word and where it is moved.

erase     a word, to nothing
replace   a word by another word
moderate  either of them by a share of the way
debias    a class towards some attributes and away from others, each by an amount
restore   a word that was edited, by a strength: less of the way, and at 1 no edit at all
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..concept.errors import MergeError

MOST_EDITS = 64
MOST_AMOUNT = 4.0
_LONGEST = 200
"""Characters of a word or of a phrase"""


@dataclass(frozen=True)
class Edit:
    """One word or phrase, and what it is to mean."""

    word: str
    into: str = ""
    """The word that it becomes; empty for nothing"""
    share: float = 1.0
    """How much of the way from what it is to what it becomes, 0 to 1"""
    attributes: tuple[tuple[str, float], ...] = ()
    """Words that are added to what the class means, each as often as its number says; a negative
    one is taken away. UCE takes the share of pictures that is wanted less the share that is drawn.
    """

    def __post_init__(self) -> None:
        for text in (self.word, self.into, *(name for name, _ in self.attributes)):
            _check_text(text)
        if not self.word.strip():
            raise MergeError("An edit names no word. Write the word to edit, 'square' for one.")
        if self.into and self.attributes:
            raise MergeError(
                f"'{self.word}' cannot become '{self.into}' and be spread over attributes at "
                "once. Give one of the two."
            )
        if self.into == self.word:
            raise MergeError(f"'{self.word}' is to become itself. Give another word.")
        if not 0 < self.share <= 1:
            raise MergeError(
                f"A share of {self.share:g} was given for '{self.word}'; more than 0 and at most 1 "
                "is needed. Leave the edit out for 0."
            )
        wrong = [name for name, amount in self.attributes if not abs(amount) <= MOST_AMOUNT]
        if wrong:
            raise MergeError(
                f"The amount of '{wrong[0]}' in '{self.word}' must lie between {-MOST_AMOUNT:g} "
                f"and {MOST_AMOUNT:g}. Give the share of pictures that you want less the share now."
            )

    def says(self) -> str:
        """`square erased`, for reports and lists."""
        if self.attributes:
            parts = ", ".join(f"{amount:+g} {name}" for name, amount in self.attributes)
            done = f"debiased, {parts}"
        else:
            done = f"replaced by '{self.into}'" if self.into else "erased"
        return f"'{self.word}' {done}{f', {self.share:.0%} of it' if self.share < 1 else ''}"

    def as_json(self) -> dict[str, Any]:
        return {
            "word": self.word,
            "into": self.into,
            "share": self.share,
            "attributes": [list(pair) for pair in self.attributes],
        }


def in_one_order(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """Sorted, so that the order in which edits are given never matters. Raises MergeError for none,
    for too many, and for two of the same word.
    """
    if not edits:
        raise MergeError("No edit was given. Name a word to erase, for one.")
    if len(edits) > MOST_EDITS:
        raise MergeError(f"{len(edits)} edits were given; {MOST_EDITS} are the most at once.")
    ordered = tuple(sorted(edits, key=lambda edit: edit.word))
    for one, other in zip(ordered, ordered[1:], strict=False):
        if one.word == other.word:
            raise MergeError(
                f"'{one.word}' is edited twice: {one.says()}; {other.says()}. Keep one of them."
            )
    return ordered


def restored(edits: Sequence[Edit], strengths: Mapping[str, float]) -> tuple[Edit, ...]:
    """The edits with some of their words given back: at strength 1 wholly, as if never edited."""
    known = {edit.word for edit in edits}
    for word, strength in strengths.items():
        if word not in known:
            raise MergeError(
                f"'{word}' cannot be restored: the edit given has not touched it. It has edited "
                f"{', '.join(sorted(known)) or 'nothing'}."
            )
        if not 0 <= strength <= 1:
            raise MergeError(f"'{word}' is restored by {strength:g}; 0 to 1 is needed.")
    kept = ((edit, 1 - strengths.get(edit.word, 0.0)) for edit in edits)
    return tuple(replace(edit, share=edit.share * left) for edit, left in kept if left > 0)


def read_words(text: str) -> tuple[str, ...]:
    """Words and phrases between commas or lines, once each."""
    parts = (" ".join(part.split()) for line in text.splitlines() for part in line.split(","))
    return tuple(dict.fromkeys(part for part in parts if part))


def read_amounts(text: str) -> tuple[tuple[str, float], ...]:
    """`red: 0.3, blue: -0.3`. Raises MergeError."""
    found: list[tuple[str, float]] = []
    for part in read_words(text):
        name, _, number = part.rpartition(":")
        try:
            found.append((name.strip(), float(number)))
        except ValueError as error:
            raise MergeError(
                f"{part!r} is no attribute with its amount. Write 'red: 0.3, blue: -0.3'."
            ) from error
    if not found or not all(name for name, _ in found):
        raise MergeError(
            f"The attributes are {text.strip()!r}. Write each with its amount, 'red: 0.3, "
            "blue: -0.3'."
        )
    return tuple(found)


def edits_of(provenance: Mapping[str, Any]) -> tuple[Edit, ...]:
    """What an edited concept remembers of its edits. Raises MergeError where it is no such concept
    or was written by somebody else's hand.
    """
    entries = provenance.get("edits")
    if not isinstance(entries, list) or not entries:
        raise MergeError(
            "The concept given is not the result of Edit Concepts, so there is nothing to add to "
            "or to restore. Connect one that Edit Concepts made."
        )
    try:
        return tuple(
            Edit(
                str(entry["word"]),
                str(entry["into"]),
                float(entry["share"]),
                tuple((str(name), float(amount)) for name, amount in entry["attributes"]),
            )
            for entry in entries[: MOST_EDITS + 1]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MergeError(
            f"What the concept says of its edits cannot be read ({error}). Make the edit again."
        ) from error


def _check_text(text: str) -> None:
    if len(text) > _LONGEST or not text.isprintable():
        raise MergeError(
            f"{text[:40]!r} is no word or phrase. At most {_LONGEST} characters on one line."
        )
