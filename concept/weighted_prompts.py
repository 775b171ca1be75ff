"""Prompts as ComfyUI's users write them: `(cat:1.2)` weighs 1.2, `(cat)` 1.1, `\\(` is a bracket.

The grammar is ComfyUI's, so that a prompt draws the same wherever it is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

_BRACKETS_WEIGH = 1.1
_ESCAPES = {"\\(": "\ue000", "\\)": "\ue001"}
"""Stand for brackets that are text; Unicode gives these characters no meaning"""
_ESCAPED = str.maketrans({"(": "\\(", ")": "\\)"})
_PLAIN = str.maketrans({"\ue000": "(", "\ue001": ")"})


def weighted_parts(prompt: str) -> list[tuple[str, float]]:
    """The stretches of a prompt's text in order, each with its weight.

    A number after the last colon in brackets is the weight of what they hold; without one it is
    1.1 times that around them. Brackets that do not close are text.
    """
    for escape, character in _ESCAPES.items():
        prompt = prompt.replace(escape, character)
    return [(text.translate(_PLAIN), weight) for text, weight in _parts(prompt, 1.0)]


def as_prompt(parts: list[tuple[str, float]]) -> str:
    """The inverse: a prompt of which `weighted_parts` makes these."""
    escaped = [(text.translate(_ESCAPED), weight) for text, weight in parts]
    return "".join(f"({text}:{weight!r})" for text, weight in escaped)


def _parts(text: str, weight: float) -> Iterator[tuple[str, float]]:
    for piece in _pieces(text):
        if len(piece) < 2 or (piece[0], piece[-1]) != ("(", ")"):
            yield piece, weight
            continue
        inner, colon, number = piece[1:-1].rpartition(":")
        own = _number(number) if colon and inner else None
        if own is None:
            inner, own = piece[1:-1], weight * _BRACKETS_WEIGH
        yield from _parts(inner, own)


def _pieces(text: str) -> Iterator[str]:
    """What stands in brackets, with them, and what stands between."""
    depth = start = 0
    for place, character in enumerate(text):
        if character == "(":
            if depth == 0 and start < place:
                yield text[start:place]
                start = place
            depth += 1
        elif character == ")":
            depth -= 1
            if depth == 0:
                yield text[start : place + 1]
                start = place + 1
    if start < len(text):
        yield text[start:]


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
