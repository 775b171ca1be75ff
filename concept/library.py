"""Concept files as a list to search and sort, for the command line and the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .card import ConceptCard, read_card
from .errors import ConceptFileError, OtherFileError
from .layers import FAMILIES

ORDERS = ("ascending", "descending")
_FAMILIES = list(FAMILIES)
_SORTS: Mapping[str, Callable[[str, ConceptCard], Any]] = {
    "name": lambda name, card: name.casefold(),
    "date": lambda name, card: card.created,
    "base": lambda name, card: _FAMILIES.index(card.base),
    "size": lambda name, card: card.megabytes,
}
SORTS = tuple(_SORTS)
_LARGEST_FIRST = ("date", "size")
"""What one looks for is new, or takes the room."""


@dataclass(frozen=True)
class Listing:
    """Concept files in order."""

    cards: Mapping[str, ConceptCard]
    """By the name that the file was looked up by"""
    unreadable: Mapping[str, str]
    """Name → why, whatever was searched for"""
    other: tuple[str, ...] = ()
    """Files of other tools, which Load Concept can open"""

    def as_json(self) -> dict[str, Any]:
        concepts = [{"name": name, **card.as_json()} for name, card in self.cards.items()]
        return {"concepts": concepts, "unreadable": dict(self.unreadable), "other": self.other}


def list_concepts(
    names: Iterable[str],
    path_of: Callable[[str], Path],
    *,
    search: str = "",
    base: str = "",
    sort: str = "name",
    order: str = "",
) -> Listing:
    """Reads the headers of concept files, `path_of` each of the names.

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
    other: list[str] = []
    for name in sorted(names):
        try:
            card = read_card(path_of(name))
        except OtherFileError:
            other.append(name)
            continue
        except ConceptFileError as error:
            unreadable[name] = str(error)
            continue
        if base in ("", card.base) and _holds(name, card, search):
            cards[name] = card
    descending = order == "descending" or (not order and sort in _LARGEST_FIRST)
    key = _SORTS[sort]
    found = sorted(cards.items(), key=lambda item: key(*item), reverse=descending)
    return Listing(dict(found), unreadable, tuple(other))


def _holds(name: str, card: ConceptCard, search: str) -> bool:
    text = " ".join([name, *card.prompts]).casefold()
    return all(word in text for word in search.casefold().split())


def _check(what: str, given: str, known: Iterable[str]) -> None:
    if given not in known:
        named = ", ".join(filter(None, known))
        raise ValueError(f"{what} is {given!r}, needed one of {named}")
