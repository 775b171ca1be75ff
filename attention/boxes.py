"""Where in a picture a word's subject is, from where the word was looked at: for crops."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as shares of the picture's edges"""
_HALF = 0.5
"""From where on, between a map's least and its most, a place counts"""
_MARGIN = 0.1
"""Of the subject's size, on each side"""
_SMALLEST = 0.25
"""Of the picture's edge: what is cut out smaller tells nothing"""


def subject_boxes(maps: Tensor) -> list[Box]:
    """A box for each word of maps (words, h, w) of one picture: around the connected places with
    the most attention to it, where it has at least half of its range and more than other words.
    """
    flat = maps.flatten(1)
    low, high = flat.amin(1)[:, None, None], flat.amax(1)[:, None, None]
    heat = (maps - low) / (high - low).clamp(min=1e-12)
    most = heat.argmax(0)
    boxes: list[Box] = []
    for word, own in enumerate(heat):
        on = (own >= _HALF) & (most == word)
        if not on.any():
            on = own >= own.max()
        places = _largest_part(on, own)
        top, bottom = _span([y for y, _ in places], own.shape[0])
        left, right = _span([x for _, x in places], own.shape[1])
        boxes.append((left, top, right, bottom))
    return boxes


def _largest_part(on: Tensor, heat: Tensor) -> list[tuple[int, int]]:
    """Rows and columns of the places next to each other that have the most heat together."""
    left = {(int(y), int(x)) for y, x in on.nonzero()}
    values = heat.tolist()
    best: list[tuple[int, int]] = []
    most = -1.0
    while left:
        part, waiting = [], [left.pop()]
        while waiting:
            y, x = waiting.pop()
            part.append((y, x))
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in left:
                    left.remove(near)
                    waiting.append(near)
        total = sum(values[y][x] for y, x in part)
        if total > most:
            best, most = part, total
    return best


def _span(places: Sequence[int], size: int) -> tuple[float, float]:
    """From the first to behind the last, with a margin, not too small and inside."""
    first, last = min(places) / size, (max(places) + 1) / size
    length = max((last - first) * (1 + 2 * _MARGIN), _SMALLEST)
    middle = (first + last) / 2
    first = min(max(middle - length / 2, 0.0), max(1 - length, 0.0))
    return first, min(first + length, 1.0)


def boxes_of(maps: Tensor, names: Sequence[str]) -> list[dict[str, Box]]:
    """For each picture of maps (b, words, h, w): name → box, `names` in the order of the words."""
    return [dict(zip(names, subject_boxes(one), strict=True)) for one in maps.detach().cpu()]
