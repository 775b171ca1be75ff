"""Line plots, drawn by Pillow: one more library only for that would be much."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#3d7fd9", "#e07b28", "#2f9e6e", "#c2477f", "#8a6bd1", "#8d8a3c")
"""Told apart by most colour-blind people, and on light and dark ground."""
_DENSITY = 2
"""Pixels for one unit of length: sharp on dense screens."""
_SMOOTHING = 2
"""Pillow's lines are jagged: drawn so many times larger, and reduced."""
_LEFT, _TOP, _RIGHT, _BOTTOM = 62, 64, 18, 48
_LEGEND_LINE, _LEGEND_SAMPLE = 20, 26
_DASH, _GAP = 6.0, 4.0
_TEXT_SIZE, _TITLE_SIZE = 13, 15

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line of a plot."""

    name: str
    points: Sequence[Point]
    colour: str = COLOURS[0]
    dashed: bool = False
    marks: Sequence[Point] = ()
    """Where dots are put"""


@dataclass(frozen=True)
class Axis:
    """What an axis is called, and where it begins and ends; as the data do, when not said."""

    label: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    percent: bool = False


@dataclass(frozen=True)
class _Ground:
    """Colours of what is not data."""

    paper: str
    text: str
    faint: str


_LIGHT = _Ground("#ffffff", "#3c3f44", "#dddfe3")
_DARK = _Ground("#1f2125", "#c9ccd2", "#3a3d43")


def line_plot(
    title: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    *,
    width: int = 680,
    height: int = 400,
    dark: bool = False,
) -> Image.Image:
    """An RGB picture, twice `width` by `height` in pixels.

    Points that an axis cannot show (not finite, or not above 0 on a logarithmic one) are left out.
    Raises ValueError where no point is left.
    """
    scale = _DENSITY * _SMOOTHING
    ground = _DARK if dark else _LIGHT
    canvas = Image.new("RGB", (width * scale, height * scale), ground.paper)
    pen = _Pen(ImageDraw.Draw(canvas), scale, ground)
    legend = max(pen.width_of(line.name) for line in series) + _LEGEND_SAMPLE + 24
    shown = [p for line in series for p in (*line.points, *line.marks) if _can_show(p, x, y)]
    if not shown:
        raise ValueError(f"the plot {title!r} has no point that its axes can show")
    right, bottom = width - _RIGHT - legend, height - _BOTTOM
    across = _Scale.of(x, [p[0] for p in shown], _LEFT, right)
    up = _Scale.of(y, [p[1] for p in shown], bottom, _TOP)

    pen.text((_LEFT, 22), title, "lm", _TITLE_SIZE)
    for value, label in across.ticks(most=8):
        pen.line([(across(value), _TOP), (across(value), bottom)], ground.faint, 1)
        pen.text((across(value), bottom + 6), label, "mt")
    for value, label in up.ticks(most=6):
        pen.line([(_LEFT, up(value)), (right, up(value))], ground.faint, 1)
        pen.text((_LEFT - 8, up(value)), label, "rm")
    pen.text((right, height - 10), x.label, "rb")
    pen.text((_LEFT, _TOP - 8), y.label, "lb")
    for number, line in enumerate(series):
        points = [(across(p[0]), up(p[1])) for p in line.points if _can_show(p, x, y)]
        pen.line(points, line.colour, 2, line.dashed)
        for mark in line.marks:
            if _can_show(mark, x, y):
                pen.dot((across(mark[0]), up(mark[1])), line.colour)
        middle = _TOP + 8 + number * _LEGEND_LINE
        sample = right + 18
        pen.line([(sample, middle), (sample + _LEGEND_SAMPLE, middle)], line.colour, 2, line.dashed)
        pen.text((sample + _LEGEND_SAMPLE + 6, middle), line.name, "lm")
    return canvas.reduce(_SMOOTHING)


@dataclass(frozen=True)
class _Pen:
    """Draws in units of length."""

    draw: ImageDraw.ImageDraw
    scale: int
    ground: _Ground

    def text(self, place: Point, words: str, anchor: str, size: int = _TEXT_SIZE) -> None:
        self.draw.text(self._pixels(place), words, self.ground.text, self._font(size), anchor)

    def width_of(self, words: str) -> float:
        return self.draw.textlength(words, self._font(_TEXT_SIZE)) / self.scale

    def line(
        self, points: Sequence[Point], colour: str, width: float, dashed: bool = False
    ) -> None:
        if len(points) < 2:
            return
        for part in _dashes(points) if dashed else [points]:
            pixels = [self._pixels(point) for point in part]
            self.draw.line(pixels, colour, round(width * self.scale), joint="curve")

    def dot(self, place: Point, colour: str) -> None:
        x, y = self._pixels(place)
        for radius, fill in ((5.5, self.ground.paper), (4.0, colour)):
            size = radius * self.scale
            self.draw.ellipse((x - size, y - size, x + size, y + size), fill)

    def _font(self, size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
        return ImageFont.load_default(size * self.scale)

    def _pixels(self, place: Point) -> Point:
        return place[0] * self.scale, place[1] * self.scale


@dataclass(frozen=True)
class _Scale:
    """Values to lengths along an axis."""

    axis: Axis
    low: float
    high: float
    start: float
    end: float

    @staticmethod
    def of(axis: Axis, values: Sequence[float], start: float, end: float) -> _Scale:
        low = min(values) if axis.low is None else axis.low
        high = max(values) if axis.high is None else axis.high
        if high <= low:  # one value alone stands in the middle
            room = abs(low) / 2 or 0.5
            low, high = low - room, low + room
        return _Scale(axis, low, high, start, end)

    def __call__(self, value: float) -> float:
        measure: Callable[[float], float] = math.log if self.axis.log else float
        low, high = measure(self.low), measure(self.high)
        part = (measure(value) - low) / (high - low)
        return self.start + min(max(part, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, most: int) -> Iterator[tuple[float, str]]:
        values = list(self._round_values(most))
        places = max(_places(value * (100 if self.axis.percent else 1)) for value in values)
        for value in values:
            if self.axis.percent:
                yield value, f"{100 * value:.{places}f} %"
            else:
                yield value, f"{value:g}" if self.axis.log else f"{value:.{places}f}"

    def _round_values(self, most: int) -> Iterator[float]:
        slack = 1e-9 * (self.high - self.low)
        if self.axis.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            within = last - first <= most / 3
            every = max(1, math.ceil((last - first) / most))
            for power in range(first, last + 1, every):
                for digit in (1, 2, 5) if within else (1,):
                    if self.low - slack <= digit * 10.0**power <= self.high + slack:
                        yield digit * 10.0**power
            return
        step = _round_step((self.high - self.low) / most)
        number = math.ceil((self.low - slack) / step)
        while number * step <= self.high + slack:
            yield number * step
            number += 1


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least * (1 - 1e-9))


def _places(value: float) -> int:
    """Decimal places that a round number needs."""
    return next((n for n in range(9) if abs(round(value, n) - value) <= 1e-9 * abs(value)), 9)


def _can_show(point: Point, x: Axis, y: Axis) -> bool:
    return all(
        math.isfinite(value) and (value > 0 or not axis.log)
        for value, axis in zip(point, (x, y), strict=True)
    )


def _dashes(points: Sequence[Point]) -> Iterator[list[Point]]:
    """The strokes of a dashed line."""
    dash: list[Point] = list(points[:1])
    left, drawing = _DASH, True
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        length, gone = math.hypot(x1 - x0, y1 - y0), 0.0
        while length - gone > left:
            gone += left
            here = (x0 + (x1 - x0) * gone / length, y0 + (y1 - y0) * gone / length)
            if drawing:
                yield [*dash, here]
            dash, drawing = [here], not drawing
            left = _DASH if drawing else _GAP
        left -= length - gone
        if drawing:
            dash.append((x1, y1))
    if drawing and len(dash) > 1:
        yield dash
