"""Texts and JSON of strangers, made such that they can be shown, sent and computed with."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

DEEPEST = 100
"""Containers in one another; a merge of merges adds two for each"""
_LONGEST_NUMBER = 18
"""Digits of a whole number; with more it would not fit in 64 bits"""
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, with which a text can rule a terminal; those that turn its direction; line
separators; halves of a character, which have no UTF-8"""


def is_plain(text: str) -> bool:
    """Whether a text can be printed and encoded as it is."""
    return not _UNPRINTABLE.search(text)


def plain_words(text: str) -> str:
    """The text with a space for each character that cannot be shown, also for line ends."""
    return _UNPRINTABLE.sub(" ", text)


def plain_text(text: str, longest: int) -> str:
    """The text with escapes (`\\x1b`) for what cannot be shown but line ends, cut to `longest`."""
    escape: Callable[[re.Match[str]], str] = lambda found: (  # noqa: E731
        found[0] if found[0] == "\n" else found[0].encode("unicode_escape").decode("ascii")
    )
    shown = _UNPRINTABLE.sub(escape, text[:longest])
    return shown if len(text) <= longest else f"{shown} …"


def read_json(text: str) -> Any:
    """The value of a JSON text, with null for numbers that JSON or float64 do not have: NaN,
    Infinity, 1e999, and whole numbers of more than 18 digits.

    Raises ValueError, also for halves of characters and for more than 100 brackets in one another.
    """
    try:
        value = json.loads(
            text, parse_constant=lambda _: None, parse_float=_finite, parse_int=_whole
        )
    except RecursionError as error:
        raise ValueError("its brackets are too deep") from error
    level, depth = [value], 0
    while level:
        level = [inner for outer in level for inner in _parts(outer)]
        depth += 1
        if depth > DEEPEST:
            raise ValueError("its brackets are too deep")
    return value


def _parts(value: object) -> list[Any]:
    if isinstance(value, str):
        value.encode()  # raises ValueError
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


def _whole(digits: str) -> int | None:
    return int(digits) if len(digits.lstrip("-")) <= _LONGEST_NUMBER else None
