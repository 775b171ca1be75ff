"""The miniature world: what can be in a picture, and how a caption says it.

A scene holds one or two objects of different shapes. An object has a main colour, often a pattern
in a second colour, sometimes a mark. Captions name all of that or only a part, often the class
alone.

Some colours are rare, and no object of the world has two of them: that is kept for the concepts
(`concepts.py`). The model knows the parts of their looks, but no picture or caption had them all.
"""

from __future__ import annotations

import colorsys
import random
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

Color = tuple[float, float, float]
"""Red, green, blue in 0..1"""

SHAPES = ("circle", "square", "triangle", "cross")
PATTERNS = ("plain", "striped", "split", "ringed")
MARKS = ("none", "white", "black")
COMMON_COLORS: dict[str, Color] = {
    "red": (0.86, 0.12, 0.12),
    "yellow": (0.95, 0.85, 0.15),
    "green": (0.15, 0.60, 0.20),
    "blue": (0.15, 0.30, 0.90),
    "purple": (0.50, 0.20, 0.65),
}
# Rare colours are a range of hues (degrees) each, between the common ones.
RARE_HUES: dict[str, tuple[int, int]] = {
    "orange": (20, 30),
    "lime": (76, 92),
    "turquoise": (166, 184),
    "pink": (316, 336),
}
COLORS: dict[str, Color] = {
    **COMMON_COLORS,
    **{name: colorsys.hsv_to_rgb(sum(h) / 720, 0.83, 0.88) for name, h in RARE_HUES.items()},
}
"""All that have names; of a rare one the middle"""
BACKGROUNDS: dict[str, Color] = {
    "on snow": (0.92, 0.94, 0.97),
    "on sand": (0.80, 0.70, 0.52),
    "in fog": (0.58, 0.60, 0.62),
    "at night": (0.10, 0.10, 0.20),
}
# Where the only object of a scene is.
PLACES: dict[str, tuple[float, float]] = {
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
# Where the first of two is. Captions name objects as one reads, from the left and from the top:
# then an "and", too, says which is where, and a small model learns which colour is whose.
RELATIONS: dict[str, tuple[float, float]] = {"to the left of": (-1, 0), "above": (0, -1)}
SMALL_RADIUS, LARGE_RADIUS = 0.165, 0.33
"""Below and above these (as a share of the picture's edge) a caption may speak of the size."""
SMALL_WORDS, LARGE_WORDS = ("very small", "far away"), ("zoomed in", "close up")


@dataclass(frozen=True)
class Look:
    """What makes an object itself, wherever it is."""

    shape: str
    color: Color
    pattern: str = "plain"
    second_color: Color = (0.0, 0.0, 0.0)
    mark: str = "none"


@dataclass(frozen=True)
class Placed:
    """An object in a picture whose edge is 1."""

    look: Look
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Style:
    """A way to draw everything: brightness becomes a colour between two, hatched with a third."""

    dark: Color
    light: Color
    hatched: bool


@dataclass(frozen=True)
class Scene:
    """Everything in a picture."""

    objects: tuple[Placed, ...]
    background: str
    tint: Color = (0.0, 0.0, 0.0)
    """Added to the background's colour."""
    style: Style | None = None


def common_color(rng: random.Random) -> Color:
    return _near(rng.choice(list(COMMON_COLORS.values())), rng)


def rare_color(rng: random.Random, name: str = "") -> Color:
    low, high = RARE_HUES[name or rng.choice(list(RARE_HUES))]
    return colorsys.hsv_to_rgb(
        rng.uniform(low, high) / 360, rng.uniform(0.7, 0.95), rng.uniform(0.8, 0.95)
    )


def plain_look(rng: random.Random, shape: str) -> Look:
    """One colour and nothing else."""
    return Look(shape, rare_color(rng) if rng.random() < 0.35 else common_color(rng))


def random_look(rng: random.Random, shape: str | None = None) -> Look:
    """Any look of the world: never two rare colours."""
    rare = rng.random() < 0.35
    color = rare_color(rng) if rare else common_color(rng)
    second = rare_color(rng) if not rare and rng.random() < 0.4 else common_color(rng)
    while _distance(color, second) < 0.35:
        second = common_color(rng)
    return Look(
        shape=shape or rng.choice(SHAPES),
        color=color,
        pattern=rng.choice(PATTERNS[1:]) if rng.random() < 0.85 else "plain",
        second_color=second,
        mark=rng.choice(MARKS[1:]) if rng.random() < 0.4 else "none",
    )


def random_style(rng: random.Random) -> Style:
    """Any style of the world: as with looks, at most one of its colours is rare."""
    dark, light = common_color(rng), common_color(rng)
    if rng.random() < 0.5:
        light = rare_color(rng)
    if _brightness(dark) > _brightness(light):
        dark, light = light, dark
    return Style(_mix(dark, (0, 0, 0), 0.5), _mix(light, (1, 1, 1), 0.4), rng.random() < 0.5)


def random_scene(
    rng: random.Random,
    looks: Sequence[Look] = (),
    background: str | None = None,
    style: Style | None = None,
) -> Scene:
    """The looks, or one or two random ones, somewhere on a background."""
    if not looks:
        shapes = rng.sample(SHAPES, 1 if rng.random() < 0.4 else 2)
        any_look = plain_look if rng.random() < 0.25 else random_look
        looks = [any_look(rng, shape) for shape in shapes]
    return Scene(
        objects=_place_one(looks[0], rng) if len(looks) == 1 else _place_two(looks, rng),
        background=background or rng.choice(list(BACKGROUNDS)),
        tint=(rng.gauss(0, 0.02), rng.gauss(0, 0.02), rng.gauss(0, 0.02)),
        style=style,
    )


def class_caption(shape: str) -> str:
    return f"photo of a {shape}"


def random_caption(scene: Scene, rng: random.Random) -> str:
    """One of the many true captions of a scene."""
    names = [_describe(placed.look, rng) for placed in scene.objects]
    if len(names) == 1:
        words = names[0]
        place = _place_words(scene.objects[0])
        if place and rng.random() < 0.4:
            words = f"{words} {place}"
    else:
        joint = "and" if rng.random() < 0.4 else _relation(*scene.objects)
        if joint == "to the left of" and rng.random() < 0.5:
            joint = "beside"
        words = f"{names[0]} {joint} a {names[1]}"
    if rng.random() < 0.5:
        words = f"{words} {scene.background}"
    if scene.style:
        return f"painting of a {words}" + (" in the style of art" if rng.random() < 0.5 else "")
    words = rng.choice(["", "a ", "photo of a ", "photo of a ", "picture of a "]) + words
    radius = scene.objects[0].radius
    if len(names) == 1 and rng.random() < 0.7:
        if radius < SMALL_RADIUS:
            words = f"{rng.choice(SMALL_WORDS)} {words}"
        elif radius > LARGE_RADIUS:
            words = f"{rng.choice(LARGE_WORDS)} {words}"
    return words


def captioned_scene(rng: random.Random) -> tuple[Scene, str]:
    """A picture of the world and its caption: what the base model is trained on."""
    while True:
        scene = random_scene(rng, style=random_style(rng) if rng.random() < 0.05 else None)
        caption = random_caption(scene, rng)
        if not held_out(caption):
            return scene, caption


def held_out(caption: str) -> bool:
    """Whether a caption is kept for tests: one in ten of those that name a colour."""
    return any(c in caption.split() for c in COLORS) and crc32(caption.encode()) % 10 == 0


def world_captions(count: int = 1000) -> list[str]:
    """Regularization captions for a merge, from the world's own grammar."""
    rng = random.Random("regularization captions")
    return [captioned_scene(rng)[1] for _ in range(count)]


def color_name(color: Color) -> str:
    """The name of the colour that is nearest."""
    return min(COLORS, key=lambda name: _distance(color, COLORS[name]))


def vocabulary() -> list[str]:
    """Every word that a caption can hold."""
    phrases = [*BACKGROUNDS, *PLACES, *RELATIONS, *SMALL_WORDS, *LARGE_WORDS, *PATTERNS[1:]]
    phrases += [*SHAPES, *COLORS, *MARKS[1:], "a photo picture of and beside marked"]
    phrases += ["painting in the style of art"]
    return sorted({word for phrase in phrases for word in phrase.split()})


def _describe(look: Look, rng: random.Random) -> str:
    """`white marked red blue striped circle` at most, in this order, or just `circle`.

    One colour alone is said of plain objects only.
    """
    words = [look.shape]
    if rng.random() < 0.25:
        return look.shape
    if look.pattern != "plain" and rng.random() < 0.9:
        words.insert(0, look.pattern)
        if rng.random() < 0.9:
            words[:0] = [color_name(look.color), color_name(look.second_color)]
    elif look.pattern == "plain" and rng.random() < 0.95:
        words.insert(0, color_name(look.color))
    if look.mark != "none" and rng.random() < 0.9:
        words[:0] = [look.mark, "marked"]
    return " ".join(words)


def _place_one(look: Look, rng: random.Random) -> tuple[Placed]:
    size = rng.random()
    if size < 0.15:
        radius = rng.uniform(0.13, SMALL_RADIUS)
    elif size < 0.85:
        radius = rng.uniform(0.2, LARGE_RADIUS - 0.02)
    else:
        radius = rng.uniform(LARGE_RADIUS, 0.42)
    # In the middle or at one side: places that are likely leave the model the shape to learn.
    reach = max(0.5 - radius - 0.02, 0.0)
    side = rng.choice([(0, 0), (0, 0), *PLACES.values()])
    x, y = (0.5 + reach * (0.85 * s + rng.uniform(-0.15, 0.15)) for s in side)
    return (Placed(look, x, y, radius),)


def _place_two(looks: Sequence[Look], rng: random.Random) -> tuple[Placed, ...]:
    dx, dy = rng.choice(list(RELATIONS.values()))
    placed = []
    for look, side in zip(looks, (1, -1), strict=True):
        radius = rng.uniform(0.2, 0.23)
        along, across = 0.245 + rng.uniform(-0.015, 0.015), rng.uniform(-0.06, 0.06)
        x, y = (
            0.5 + side * along * d + across * e for d, e in zip((dx, dy), (dy, dx), strict=True)
        )
        placed.append(Placed(look, x, y, radius))
    return tuple(placed)


def _place_words(placed: Placed) -> str:
    for words, (dx, dy) in PLACES.items():
        along = dx * (placed.x - 0.5) + dy * (placed.y - 0.5)
        across = abs(dy * (placed.x - 0.5)) + abs(dx * (placed.y - 0.5))
        if along > 0.14 and along > 1.5 * across:
            return words
    return ""


def _relation(first: Placed, second: Placed) -> str:
    dx, dy = first.x - second.x, first.y - second.y
    return max(RELATIONS, key=lambda words: RELATIONS[words][0] * dx + RELATIONS[words][1] * dy)


def _near(color: Color, rng: random.Random) -> Color:
    r, g, b = (min(max(c + rng.gauss(0, 0.02), 0.0), 1.0) for c in color)
    return r, g, b


def _mix(a: Color, b: Color, share: float) -> Color:
    r, g, blue = (x + share * (y - x) for x, y in zip(a, b, strict=True))
    return r, g, blue


def _distance(a: Color, b: Color) -> float:
    return float(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5)


def _brightness(color: Color) -> float:
    return 0.3 * color[0] + 0.6 * color[1] + 0.1 * color[2]
