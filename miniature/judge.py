"""The judge: what a picture of the miniature world shows, in numbers that mean what the paper's do.

- **Text alignment** (CLIP-T in the paper): the share of what a prompt says that can be seen. As in
  the paper the modifier token is left out: `<new1> circle` asks for a circle.
- **Image alignment** (CLIP-I): how much the object of the concept's class looks like the concept.
- **Drift** (KID): the distance between pictures of the bare class and pictures of the world.
- **Both present** and **bleed**: whether two concepts are in one picture, and whether one wears a
  colour of the other.

It sees with `recognizer.py`, which is trained on drawn pictures and knows the colours of things as
numbers, so it can tell the shades of one name apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..evaluation import distances
from .recognizer import Seen
from .world import BACKGROUNDS, COLORS, MARKS, PATTERNS, PLACES, RELATIONS, SHAPES, Color, Look

COLOR_TOLERANCE = 0.25
"""Distance in RGB at which two colours count as alike by 1/e."""
PRESENT = 0.6
"""Image alignment from which on a concept counts as present."""
BLOCK = 8
"""Pictures whose KID is taken together."""


@dataclass(frozen=True)
class Said:
    """What a prompt says of one object; empty where it says nothing."""

    shape: str
    color: str = ""
    second_color: str = ""
    pattern: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Facts:
    """What a prompt says, without the looks of concepts."""

    objects: tuple[Said, ...]
    background: str = ""
    place: str = ""
    """Of the only object, or of the first relative to the second."""

    @staticmethod
    def of(caption: str) -> Facts:
        """Reads a caption of the world's grammar; words that it does not know say nothing."""
        objects: list[Said] = []
        colors, pattern, mark = [""], "", ""
        for word, following in pairwise([*caption.split(), ""]):
            if following == "marked":
                mark = word
            elif word in COLORS:
                colors = [*filter(None, colors), word]
            elif word in PATTERNS:
                pattern = word
            elif word in SHAPES:
                # One colour without a pattern promises an object that is all of it.
                if colors[0] and not pattern:
                    pattern = "plain"
                first, second = (*colors, "")[:2]
                objects.append(Said(word, first, second, pattern, mark))
                colors, pattern, mark = [""], "", ""
        relations = RELATIONS if len(objects) > 1 else PLACES
        return Facts(
            objects=tuple(objects),
            background=next((b for b in BACKGROUNDS if b in caption), ""),
            place=next((p for p in relations if p in caption), ""),
        )


def follows(seen: Seen, facts: Sequence[Facts]) -> Tensor:
    """Whether each picture (b,) shows what its prompt says and no more: shapes, number, colours."""
    return torch.stack([_follows(seen, i, fact) for i, fact in enumerate(facts)])


def text_alignment(seen: Seen, facts: Sequence[Facts]) -> Tensor:
    """The share (b,) of what is said that is seen."""
    return torch.stack([_seen_share(seen, i, fact) for i, fact in enumerate(facts)])


def image_alignment(seen: Seen, look: Look) -> Tensor:
    """How much (b,) the object of the look's shape is like it: 0 without one, 1 for the look.

    The mean over main colour, second colour, pattern and mark, times the probability that there is
    an object of the shape.
    """
    shape = SHAPES.index(look.shape)
    pattern = seen.pattern[:, shape, PATTERNS.index(look.pattern)]
    parts = [
        _alike(seen.color[:, shape], look.color),
        pattern if look.pattern == "plain" else _second_alike(seen, shape, look.second_color),
        pattern,
        seen.mark[:, shape, MARKS.index(look.mark)],
    ]
    return seen.presence[:, shape] * torch.stack(parts).mean(0)


def both_present(seen: Seen, looks: Sequence[Look]) -> Tensor:
    """Whether every look is in the picture (b,)."""
    return torch.stack([image_alignment(seen, look) > PRESENT for look in looks]).all(0)


def bleeds(seen: Seen, looks: Sequence[Look]) -> Tensor:
    """Whether an object in the picture (b,) wears a colour nearer to another look's than its own.

    Objects of the looks' shapes only; looks of a pair have no colour in common.
    """
    return torch.stack(
        [wears_another(seen, look, [x for x in looks if x is not look]) for look in looks]
    ).any(0)


def wears_another(seen: Seen, look: Look, others: Sequence[Look]) -> Tensor:
    """Whether the object of the look's shape (b,) has a colour nearer to others' than its own."""
    shape = SHAPES.index(look.shape)
    own = _nearest(seen, shape, [look.color, look.second_color])
    foreign = _nearest(seen, shape, [c for x in others for c in (x.color, x.second_color)])
    patterned = seen.pattern[:, shape, PATTERNS.index("plain")] < 0.5
    visible = torch.stack([torch.ones_like(patterned), patterned], 1)
    return ((foreign < own) & visible).any(1) & (seen.presence[:, shape] > 0.5)


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    """KID of features (n, d) that are standardised by the reference's deviation."""
    center, scale = reference.mean(0), reference.std(0) + 1e-6
    return distances.kernel_distance((features - center) / scale, (reference - center) / scale)


def block_kernel_distance(features: Tensor, reference: Tensor) -> float:
    """The median of the KID of every `BLOCK` pictures: a picture that falls apart spoils its block.

    KID has a cubic kernel, so one odd picture among 24 multiplies it by a hundred.
    """
    blocks = features.split(BLOCK)
    whole = [block for block in blocks if len(block) == BLOCK] or [features]
    return statistics.median(kernel_distance(block, reference) for block in whole)


def _follows(seen: Seen, index: int, facts: Facts) -> Tensor:
    there = seen.presence[index] > 0.5
    shapes = [said.shape for said in facts.objects]
    wanted = torch.tensor([shape in shapes for shape in SHAPES])
    right = torch.equal(there, wanted) and int(seen.count[index].argmax()) == len(shapes)
    for said in facts.objects:
        at = (index, SHAPES.index(said.shape))
        right &= not said.color or named_color(seen.color[at]) == said.color
        right &= not said.second_color or named_color(seen.second_color[at]) == said.second_color
        right &= not said.pattern or PATTERNS[int(seen.pattern[at].argmax())] == said.pattern
        right &= not said.mark or MARKS[int(seen.mark[at].argmax())] == said.mark
    return torch.tensor(right)


def _seen_share(seen: Seen, index: int, facts: Facts) -> Tensor:
    shapes = [SHAPES.index(said.shape) for said in facts.objects]
    parts = [seen.presence[index, shape] for shape in shapes]
    parts.append(seen.count[index, len(shapes)])
    for shape, said in zip(shapes, facts.objects, strict=True):
        there, at = seen.presence[index, shape], (index, shape)
        if said.color:
            parts.append(there * _alike(seen.color[at], COLORS[said.color]))
        if said.second_color:
            parts.append(there * _alike(seen.second_color[at], COLORS[said.second_color]))
        if said.pattern:
            parts.append(there * seen.pattern[at][PATTERNS.index(said.pattern)])
        if said.mark:
            parts.append(there * seen.mark[at][MARKS.index(said.mark)])
    if facts.background:
        parts.append(seen.background[index, list(BACKGROUNDS).index(facts.background)])
    if facts.place:
        centers = [seen.place[index, shape] for shape in shapes]
        from_ = centers[1] if len(centers) > 1 else torch.full((2,), 0.5)
        direction = torch.tensor((PLACES | RELATIONS)[facts.place], dtype=torch.float32)
        inside = ((centers[0] - from_) @ direction > 0.05).float()
        parts.append(torch.stack([seen.presence[index, shape] for shape in shapes]).min() * inside)
    return torch.stack(parts).mean()


def _alike(colors: Tensor, color: Color) -> Tensor:
    distance = (colors - torch.tensor(color)).norm(dim=-1)
    return torch.exp(-((distance / COLOR_TOLERANCE) ** 2))


def _second_alike(seen: Seen, shape: int, color: Color) -> Tensor:
    """The same for the second colour (b,): an object without a pattern has none."""
    patterned = 1 - seen.pattern[:, shape, PATTERNS.index("plain")]
    return patterned * _alike(seen.second_color[:, shape], color)


def named_color(color: Tensor) -> str:
    return min(COLORS, key=lambda name: float((color - torch.tensor(COLORS[name])).norm()))


def _nearest(seen: Seen, shape: int, colors: Sequence[Color]) -> Tensor:
    """Distance (b, 2) of an object's main and second colour to the nearest of these."""
    both = torch.stack([seen.color[:, shape], seen.second_color[:, shape]], 1)
    return torch.cdist(both, torch.tensor(colors)).min(-1).values
