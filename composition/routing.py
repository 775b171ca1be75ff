"""Token routing: several concepts in one picture without a merge, each at its own words.

    K_j = W₀ c_j + Σ_n m_nj a_n ΔW_n c_j      (and V_j alike)

c_j is the text feature of position j, ΔW_n what concept n changes, a_n its strength, and m_nj is
one where position j holds a word of concept n (after TARA, Peng et al., AAAI 2026, and LatexBlend,
Jin et al., CVPR 2025). Nothing is solved, so there are no conflicts and no order, and a concept
that was taught at its own words is drawn as training saw it.

A prompt has a handful of such positions, and their features do not change while a picture is drawn.
So what they add is computed once (`RowChanges`) and looked up at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..concept.concept import Concept
from ..concept.layers import is_projection
from ..concept.prompts import own_positions
from ..concept.text import TextEncoder


@dataclass(frozen=True)
class Route:
    """A concept and how much of it is added at its words."""

    concept: Concept
    strength: float = 1.0


@dataclass(frozen=True)
class RowChanges:
    """What is added to keys and values, row by row."""

    by_layer: Mapping[str, Tensor]
    """Layer → (r + 1, out), float32; row 0 is zero, for positions that keep what they have"""

    @staticmethod
    def of(routes: Sequence[Route], features: Sequence[Tensor]) -> RowChanges:
        """`features` has r rows (r, d) of each route: c_j where the row is its own, else zero."""
        layers = {
            layer: delta.shape[0]
            for route in routes
            for layer, delta in route.concept.deltas.items()
            if is_projection(layer)
        }
        changes = {}
        for layer, size in layers.items():
            total = torch.zeros(len(features[0]) + 1, size)
            for route, rows in zip(routes, features, strict=True):
                if (delta := route.concept.deltas.get(layer)) is not None:
                    total[1:] += route.strength * delta.map_rows(rows.float().cpu())
            changes[layer] = total
        return RowChanges(changes)

    def to(self, device: torch.device, dtype: torch.dtype) -> RowChanges:
        return RowChanges({layer: rows.to(device, dtype) for layer, rows in self.by_layer.items()})


def number_rows(own: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Numbers the rows at which any route acts, from 1 on, over several prompts.

    `own` has a list for each prompt: (b, n, d) of each route, c_j where the row is its own, else
    zero. Returns the numbers (b, n) of each prompt, 0 where nothing acts, and the rows (r, d) of
    each route.
    """
    numbers: list[Tensor] = []
    rows: list[list[Tensor]] = [[] for _ in own[0]]
    count = 0
    for prompt in own:
        acting = torch.stack([features.any(-1) for features in prompt]).any(0)
        counted = acting.flatten().cumsum(0).view_as(acting) + count
        numbers.append(counted * acting)
        count += int(acting.sum())
        for features, found in zip(prompt, rows, strict=True):
            found.append(features[acting])
    return numbers, [torch.cat(found) for found in rows]


class Router:
    """Adds the changes of rows to what projections put out, by forward hooks.

    While `index` is None the projections are as they are.
    """

    def __init__(self) -> None:
        self.changes = RowChanges({})
        self.index: Tensor | None = None
        """(b, n): which row of the changes each position of the context gets, 0 for none"""

    def hook(self, layer: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        """For `register_forward_hook` of the layer's linear module: (b, n, d) → (b, n, out)."""

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            changes = self.changes.by_layer.get(layer)
            if self.index is None or changes is None:
                return output
            index = self.index
            more = output.shape[1] - index.shape[1]  # rows that something else has appended
            if more:
                index = F.pad(index, (0, more))
            return output + F.embedding(index, changes).to(output)

        return add


def own_rows(concept: Concept, encoder: TextEncoder, token_ids: Sequence[int]) -> list[int]:
    """Positions of a tokenized prompt at which the concept acts: the words of all its tokens, or
    of a concept without one, its class nouns.
    """
    words = encoder.tokenize_words
    found: set[int] = set()
    for token, noun in own_words(concept):
        found.update(own_positions(token_ids, words(token) if token else [], words(noun)))
    return sorted(found)


def own_words(concept: Concept) -> list[tuple[str, str]]:
    """Modifier token and class noun of everything that the concept is; the token may be empty.

    A concept without a modifier token is a kind of thing: the last word of what it was taught as.
    """
    if concept.tokens:
        return [(token.name, token.class_noun) for token in concept.tokens]
    nouns = {prompt.split()[-1] for prompt in concept.constraint_prompts if prompt.split()}
    return [("", noun) for noun in sorted(nouns)]
