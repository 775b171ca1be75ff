"""Two objects of one shape, told apart by where they are.

The recognizer answers one question a shape. So each half of a picture is looked at by itself, in
the middle of a picture of the background's colour, and whose look which half has is the assignment
that suits both best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .judge import PRESENT, Facts, image_alignment, wears_another
from .recognizer import Recognizer, Seen
from .world import BACKGROUNDS, SHAPES, Look


@dataclass(frozen=True)
class Halves:
    """What is in both halves of a batch of pictures, and in the whole."""

    whole: Seen
    first: Seen
    """The left half, or the upper one"""
    second: Seen

    def alignments(self, looks: Sequence[Look]) -> tuple[Tensor, Tensor]:
        """How much each of two looks (b, 2) is like the half that is its own, and whether (b,) the
        first one is in the second half.
        """
        a, b = looks
        straight, crossed = (
            torch.stack([image_alignment(x, a), image_alignment(y, b)], 1)
            for x, y in ((self.first, self.second), (self.second, self.first))
        )
        swapped = crossed.sum(1) > straight.sum(1)
        return torch.where(swapped[:, None], crossed, straight), swapped

    def both_present(self, looks: Sequence[Look]) -> Tensor:
        """Whether each look is in a half of its own (b,)."""
        return (self.alignments(looks)[0] > PRESENT).all(1)

    def bleeds(self, looks: Sequence[Look]) -> Tensor:
        """Whether one of them (b,) wears a colour of the other."""
        a, b = looks
        swapped = self.alignments(looks)[1]
        straight, crossed = (
            wears_another(x, a, [b]) | wears_another(y, b, [a])
            for x, y in ((self.first, self.second), (self.second, self.first))
        )
        return torch.where(swapped, crossed, straight)

    def text_alignment(self, facts: Sequence[Facts]) -> Tensor:
        """The share (b,) of what is said that is seen: the shape in each half, two objects, the
        background.
        """
        return torch.stack([self._seen_share(i, fact) for i, fact in enumerate(facts)])

    def _seen_share(self, index: int, facts: Facts) -> Tensor:
        shape = SHAPES.index(facts.objects[0].shape)
        parts = [half.presence[index, shape] for half in (self.first, self.second)]
        parts.append(self.whole.count[index, 2])
        if facts.background:
            parts.append(self.whole.background[index, list(BACKGROUNDS).index(facts.background)])
        return torch.stack(parts).mean()


def look_at_halves(recognizer: Recognizer, pictures: Tensor, facts: Sequence[Facts]) -> Halves:
    """`pictures` (b, 3, h, w) in 0..1, divided across where a caption says that one object is above
    the other, else into left and right.
    """

    def upright(batch: Tensor) -> Tensor:
        """With the upper half on the left; the same again turns it back."""
        return torch.stack(
            [p.mT if "above" in f.place else p for p, f in zip(batch, facts, strict=True)]
        )

    halves = [upright(alone(upright(pictures), half)) for half in (0, 1)]
    first, second = (recognizer.look(half) for half in halves)
    return Halves(recognizer.look(pictures), first, second)


def alone(pictures: Tensor, half: int) -> Tensor:
    """The left (0) or right (1) half of pictures (b, 3, h, w) in the middle of nothing else."""
    width = pictures.shape[-1]
    edges = torch.cat([pictures[:, :, 0], pictures[:, :, -1]], -1)
    canvas = edges.median(-1).values[:, :, None, None].expand_as(pictures).clone()
    first = half * (width // 2)
    left = width // 4
    canvas[..., left : left + width // 2] = pictures[..., first : first + width // 2]
    return canvas
