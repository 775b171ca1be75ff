"""Texts and JSON of strangers, made such that they can be shown, sent and computed with."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

DEEPEST = 100
"""Containers in one another; a merge of merges adds two for each"""
_LONGEST_NUMBER = 20
"""Digits of a whole number that may fit in 64 bits; most seeds have 19"""
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


def json_text(value: object) -> str:
    """JSON for a person or a program, with `\\u…` for what cannot be shown."""
    lines = json.dumps(value, indent=2, ensure_ascii=False).split("\n")
    return "\n".join(_UNPRINTABLE.sub(_json_escape, line) for line in lines)


def _json_escape(found: re.Match[str]) -> str:
    return json.dumps(found[0])[1:-1]


def read_json(text: str) -> Any:
    """The value of a JSON text, with null for numbers that JSON or float64 do not have: NaN,
    Infinity, 1e999, and whole numbers of more than 64 bits.

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
    number = int(digits) if len(digits) <= _LONGEST_NUMBER else 1 << 64
    return number if -(1 << 63) <= number < 1 << 64 else None
