"""Draws scenes of the miniature world, many at a time, at any size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .world import BACKGROUNDS, MARKS, PATTERNS, SHAPES, Placed, Scene

_MARK_RADIUS = 0.3
_MARK_COLORS = {"none": (0.0, 0.0, 0.0), "white": (0.98, 0.98, 0.98), "black": (0.03, 0.03, 0.03)}
_GRADIENT = 0.06  # backgrounds are this much lighter at the top than at the bottom
_HATCHES = 12  # lines over a picture in a hatched style


def draw(scenes: Sequence[Scene], edge: int, samples: int = 3) -> Tensor:
    """Pictures (b, 3, edge, edge) in 0..1. Edges are smooth: `samples`² points for every pixel."""
    points = (torch.arange(edge * samples) + 0.5) / (edge * samples)
    y, x = torch.meshgrid(points, points, indexing="ij")
    ground = torch.tensor([_ground(scene) for scene in scenes])
    pictures = ground[:, :, None, None] + _GRADIENT * (0.5 - y)
    for number in range(max(len(scene.objects) for scene in scenes)):
        which = [i for i, scene in enumerate(scenes) if len(scene.objects) > number]
        placed = [scenes[i].objects[number] for i in which]
        inside, colors = _paint(placed, x, y)
        pictures[which] = torch.where(inside[:, None], colors, pictures[which])
    for index, scene in enumerate(scenes):
        if scene.style:
            pictures[index] = _restyle(pictures[index], scene, x, y)
    return torch.nn.functional.avg_pool2d(pictures, samples).clamp(0, 1)


def _ground(scene: Scene) -> list[float]:
    return [c + t for c, t in zip(BACKGROUNDS[scene.background], scene.tint, strict=True)]


def _paint(placed: Sequence[Placed], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Where the objects are (b, h, w), and their colours (b, 3, h, w)."""

    def each(values: Sequence[float]) -> Tensor:
        return torch.tensor(values)[:, None, None]

    radius = each([p.radius for p in placed])
    u, v = (x - each([p.x for p in placed])) / radius, (y - each([p.y for p in placed])) / radius

    shape = each([SHAPES.index(p.look.shape) for p in placed])
    pattern = each([PATTERNS.index(p.look.pattern) for p in placed])
    second = torch.stack(
        [
            torch.zeros_like(u, dtype=torch.bool),
            (v * 1.8).floor() % 2 != 0,  # striped
            u > 0,  # split
            ~_inside(shape, u / 0.62, v / 0.62),  # ringed
        ]
    )
    second = second.gather(0, pattern.expand_as(u)[None])[0]
    marked = each([p.look.mark != "none" for p in placed]) & (u * u + v * v < _MARK_RADIUS**2)

    def color(values: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor(values)[:, :, None, None]

    colors = torch.where(
        second[:, None],
        color([p.look.second_color for p in placed]),
        color([p.look.color for p in placed]),
    )
    marks = color([_MARK_COLORS[p.look.mark] for p in placed])
    assert len(MARKS) == len(_MARK_COLORS)
    return _inside(shape, u, v), torch.where(marked[:, None], marks, colors)


def _inside(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Whether points in an object's own coordinates lie in its shape; y points down."""
    shapes = torch.stack(
        [
            u * u + v * v < 0.9,  # circle
            torch.maximum(u.abs(), v.abs()) < 0.82,  # square
            (v < 0.75) & (u.abs() < 0.56 * (v + 1)),  # triangle
            torch.minimum(u.abs(), v.abs()).lt(0.34)
            & torch.maximum(u.abs(), v.abs()).lt(1),  # cross
        ]
    )
    return shapes.gather(0, shape.expand_as(u)[None])[0]


def _restyle(picture: Tensor, scene: Scene, x: Tensor, y: Tensor) -> Tensor:
    style = scene.style
    assert style is not None
    dark, light = (torch.tensor(c)[:, None, None] for c in (style.dark, style.light))
    brightness = (picture * torch.tensor([0.3, 0.6, 0.1])[:, None, None]).sum(0)
    if style.hatched:
        lines = ((x + y) * _HATCHES / 2).frac() < 0.5
        brightness = brightness - 0.25 * lines
    return dark + (light - dark) * brightness.clamp(0, 1)
