"""Two objects of one shape, told apart in pictures that are drawn with known looks."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from custom_diffusion.miniature.by_place import alone, look_at_halves
from custom_diffusion.miniature.concepts import concept_look
from custom_diffusion.miniature.drawing import draw
from custom_diffusion.miniature.judge import Facts
from custom_diffusion.miniature.model import PICTURE_EDGE
from custom_diffusion.miniature.recognizer import load_recognizer
from custom_diffusion.miniature.world import Look, Placed, Scene

COUNT = 24


def looks_of(number: int) -> tuple[Look, Look]:
    one, two = concept_look(2 * number), concept_look(2 * number + 1)
    return one, replace(two, shape=one.shape)


def pictures(first: Look, second: Look, above: bool) -> torch.Tensor:
    """The first on the left, or above, at the world's own places and sizes."""
    rng = random.Random(f"{first} {second} {above}")
    scenes = []
    for _ in range(COUNT):
        placed = []
        for look, side in ((first, -1), (second, 1)):
            along, across = 0.5 + side * 0.245, 0.5 + rng.uniform(-0.06, 0.06)
            x, y = (across, along) if above else (along, across)
            placed.append(Placed(look, x, y, rng.uniform(0.2, 0.23)))
        scenes.append(Scene(tuple(placed), rng.choice(["on snow", "on sand", "at night"])))
    return draw(scenes, PICTURE_EDGE, samples=1)


def said(look: Look, above: bool) -> list[Facts]:
    relation = "above" if above else "beside"
    return [Facts.of(f"photo of a {look.shape} {relation} a {look.shape}")] * COUNT


@pytest.mark.parametrize("above", [False, True])
def test_both_are_seen_each_in_its_half(above: bool) -> None:
    recognizer = load_recognizer()
    for number in (500, 501, 502):
        one, two = looks_of(number)
        for first, second in ((one, two), (two, one)):
            facts = said(one, above)
            halves = look_at_halves(recognizer, pictures(first, second, above), facts)
            _, swapped = halves.alignments([one, two])
            assert (swapped == (first is two)).all()
            assert halves.both_present([one, two]).float().mean() > 0.9
            assert halves.bleeds([one, two]).float().mean() < 0.1
            assert halves.text_alignment(facts).mean() > 0.8


def test_one_twice_is_not_both_and_wears_the_others_colours() -> None:
    recognizer = load_recognizer()
    one, two = looks_of(500)
    halves = look_at_halves(recognizer, pictures(one, one, False), said(one, False))
    assert not halves.both_present([one, two]).any()
    painted = replace(two, color=one.color)
    halves = look_at_halves(recognizer, pictures(one, painted, False), said(one, False))
    assert halves.bleeds([one, two]).float().mean() > 0.9


def test_a_half_stands_alone() -> None:
    picture = torch.zeros(1, 3, 8, 8)
    picture[..., 1:7, :4], picture[..., 1:7, 4:] = 0.25, 0.75
    left, right = (alone(picture, half)[0, 0] for half in (0, 1))
    assert (left[1:7, 2:6] == 0.25).all() and (right[1:7, 2:6] == 0.75).all()
    assert not left[:, :2].any() and not left[:, 6:].any()
