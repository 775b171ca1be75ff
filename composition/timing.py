"""Concepts for a part of the sampling: before it and after it a prompt means its class words alone,
and the weights are those of the base model.

A late start leaves the layout to the base model (`blending_start` of LatexBlend, Jin et al., CVPR
2025). What a concept changes is added to what its layers put out, W₀ x + a D x, so nothing is
written into weights that are used a moment later without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..concept.concept import Concept
from ..concept.delta import Delta, delta_of
from ..concept.errors import CustomDiffusionError


class SpanError(CustomDiffusionError):
    """A part of the sampling that has no step."""


@dataclass(frozen=True)
class Span:
    """A part of the sampling: 0 is its start, 1 its end."""

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise SpanError(
                f"A concept from {self.start:g} to {self.end:g} of the sampling would never act. "
                "Both are shares of it, 0 its start and 1 its end, and the start comes first."
            )

    @property
    def is_whole(self) -> bool:
        return (self.start, self.end) == (0.0, 1.0)

    def __contains__(self, progress: float) -> bool:
        return self.start <= progress <= self.end


WHOLE = Span()


def parts_of(spans: Sequence[Span]) -> list[Span]:
    """The whole sampling, divided where any of the spans begins or ends."""
    borders = sorted({0.0, 1.0, *(b for span in spans for b in (span.start, span.end))})
    return [Span(*borders) for borders in pairwise(borders)]


class TimedChanges:
    """What a concept changes, by forward hooks that count while `active`."""

    def __init__(self, concept: Concept, strength: float) -> None:
        self.deltas: Mapping[str, Delta] = concept.deltas
        self.strength = strength
        self.active = False

    def hook(
        self, layer: str, device: torch.device, dtype: torch.dtype
    ) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        """For `register_forward_hook` of the layer's linear module: (..., in) → (..., out)."""
        parts = self.deltas[layer].tensors()
        delta = delta_of(layer, {name: part.to(device, dtype) for name, part in parts.items()})

        def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            if not self.active:
                return output
            return output + self.strength * delta.map_rows(inputs[0]).to(output)

        return add
