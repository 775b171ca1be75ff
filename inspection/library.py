"""Concept files as a list to search and sort, for the command line and the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..concept.errors import ConceptFileError
from ..concept.layers import FAMILIES
from ..concept.plain import is_plain, plain_text
from .card import ConceptCard

ORDERS = ("ascending", "descending")
_FAMILIES = [*FAMILIES, ""]
"""Files that do not tell come last."""
_SORTS: Mapping[str, Callable[[str, ConceptCard], Any]] = {
    "name": lambda name, card: name.casefold(),
    "date": lambda name, card: card.created,
    "base": lambda name, card: _FAMILIES.index(card.base),
    "size": lambda name, card: card.megabytes,
}
SORTS = tuple(_SORTS)
_STRANGE = "Its name holds characters that cannot be shown. Rename the file."
_LARGEST_FIRST = ("date", "size")
"""What one looks for is new, or takes the room."""


@dataclass(frozen=True)
class Listing:
    """Concept files in order."""

    cards: Mapping[str, ConceptCard]
    """By the name that the file was looked up by"""
    unreadable: Mapping[str, str]
    """Name → why, whatever was searched for"""
    other: tuple[str, ...]
    """Names of other tools' files, which Load Concept can open, whatever was searched for"""
    bases: Mapping[str, str]
    """Family → title, of all the files, whatever was searched for"""

    def as_json(self) -> dict[str, Any]:
        concepts = [{"name": name, **card.as_json()} for name, card in self.cards.items()]
        return {
            "concepts": concepts,
            "unreadable": dict(self.unreadable),
            "other": self.other,
            "bases": dict(self.bases),
        }


def list_concepts(
    names: Iterable[str],
    card_of: Callable[[str], ConceptCard],
    *,
    search: str = "",
    base: str = "",
    sort: str = "name",
    order: str = "",
) -> Listing:
    """Sorts the cards of files, `card_of` each of the names; it may raise ConceptFileError.

    `search` are words that the name or the concept's prompts all hold, in any case of letters;
    `base` is the name of a family, or empty for all. `order` is one of `ORDERS`; empty is the one
    that suits `sort`: the newest and the largest first, else ascending. Raises ValueError for
    another base, sort or order.
    """
    _check("base", base, ("", *FAMILIES))
    _check("sort", sort, SORTS)
    _check("order", order, ("", *ORDERS))
    cards: dict[str, ConceptCard] = {}
    unreadable: dict[str, str] = {}
    for name in sorted(names):
        if not is_plain(name):
            unreadable[plain_text(name, len(name))] = _STRANGE
            continue
        try:
            cards[name] = card_of(name)
        except ConceptFileError as error:
            unreadable[name] = str(error)
    found = [
        (name, card)
        for name, card in cards.items()
        if base in ("", card.base) and _holds(name, card, search)
    ]
    descending = order == "descending" or (not order and sort in _LARGEST_FIRST)
    key = _SORTS[sort]
    found.sort(key=lambda item: key(*item), reverse=descending)
    present = {card.base for card in cards.values()}
    return Listing(
        cards=dict(found),
        unreadable=unreadable,
        other=tuple(name for name, card in cards.items() if card.other),
        bases={name: family.title for name, family in FAMILIES.items() if name in present},
    )


def _holds(name: str, card: ConceptCard, search: str) -> bool:
    text = " ".join([name, *card.prompts]).casefold()
    return all(word in text for word in search.casefold().split())


def _check(what: str, given: str, known: Iterable[str]) -> None:
    if given not in known:
        named = ", ".join(filter(None, known))
        raise ValueError(f"{what} is {given!r}, needed one of {named}")
