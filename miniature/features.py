"""The recognizer as a feature model: pictures and captions of the miniature world in one space."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..evaluation.features import Judge
from .judge import Facts, Said
from .recognizer import Recognizer, load_recognizer
from .world import BACKGROUNDS, COLORS, MARKS, PATTERNS, SHAPES

_LOOK = 6 + len(PATTERNS) + len(MARKS)
"""Numbers for how the object of a shape looks: two colours, pattern, mark"""


def miniature_judge() -> Judge:
    """A picture is what is in it and how that looks; a text is the same as far as it says, and 0
    where it says nothing.
    """
    return Judge("the miniature's recognizer", _image_features, _text_features)


@cache
def _recognizer() -> Recognizer:
    return load_recognizer()


def _image_features(images_bhwc: Tensor) -> Tensor:
    seen = _recognizer().look(images_bhwc.permute(0, 3, 1, 2))
    there = seen.presence[..., None]
    parts = [seen.color * 2 - 1, seen.second_color * 2 - 1, seen.pattern, seen.mark]
    looks = torch.cat([there * part for part in parts], -1).flatten(1)
    return torch.cat([2 * seen.presence, seen.background, looks], -1)


def _text_features(texts: Sequence[str]) -> Tensor:
    return torch.stack([_fact_features(Facts.of(text)) for text in texts])


def _fact_features(facts: Facts) -> Tensor:
    presence, looks = torch.zeros(len(SHAPES)), torch.zeros(len(SHAPES), _LOOK)
    for said in facts.objects:
        presence[SHAPES.index(said.shape)] = 2
        looks[SHAPES.index(said.shape)] = _said_features(said)
    background = torch.tensor([float(name == facts.background) for name in BACKGROUNDS])
    return torch.cat([presence, background, looks.flatten()])


def _said_features(said: Said) -> Tensor:
    colors = [
        torch.tensor(COLORS[name]) * 2 - 1 if name else torch.zeros(3)
        for name in (said.color, said.second_color)
    ]
    kinds = [float(said.pattern == name) for name in PATTERNS]
    marks = [float(said.mark == name) for name in MARKS]
    return torch.cat([*colors, torch.tensor([*kinds, *marks])])
