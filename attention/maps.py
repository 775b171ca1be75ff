"""Where words look: the cross-attention of chosen words, recorded while pictures are drawn.

    A = softmax(Q Kᵀ / √d),   map of a word = Σ of A's columns at its tokens, mean over the heads

as in Fig. 16 of Custom Diffusion (Kumari et al., CVPR 2023) and in DAAM (Tang et al., ACL 2023).
Means run by level of the network and part of the sampling, so memory does not grow with layers or
steps. Queries and keys are those of the module that is watched; what it puts out stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..concept.errors import CustomDiffusionError
from ..diffusion.levels import level_of

PARTS = 32
"""Parts of a sampling whose means are kept apart."""
MOST_WORDS = 16


class AttentionError(CustomDiffusionError):
    """Attention that cannot be recorded or shown."""


@dataclass(frozen=True)
class WatchedWord:
    """A word, or a few in a row, and the rows of the text features at which it stands."""

    text: str
    positions: Sequence[int]


@dataclass(frozen=True)
class AttentionMaps:
    """What was recorded of one sampling."""

    words: Sequence[str]
    means: Mapping[tuple[int, int], Tensor]
    """Height and width of a level → (PARTS, b, words, h, w), float32: the share of attention"""
    counts: Mapping[tuple[int, int], Tensor]
    """How many records (PARTS,) are in each mean"""
    latents: tuple[int, int]
    """Height and width of what was drawn"""

    def between(self, start: float = 0.0, end: float = 1.0, halvings: int | None = None) -> Tensor:
        """Maps (b, words, h, w) over a part of the sampling (0 its start, 1 its end), of the level
        so many halvings below the latents, or the mean of all in the size of the finest.

        Raises AttentionError where nothing was recorded.
        """
        sizes = sorted(self.means, reverse=True)
        if halvings is not None:
            sizes = [size for size in sizes if size == _halved(self.latents, halvings)]
        if not sizes:
            seen = ", ".join(f"{w} x {h}" for h, w in sorted(self.means, reverse=True))
            raise AttentionError(
                f"This network has no cross-attention at that size; it looks at {seen} places."
            )
        first = min(int(start * PARTS), PARTS - 1)
        last = max(first + 1, -int(-end * PARTS // 1))
        shown = []
        for size in sizes:
            counts = self.counts[size][first:last]
            if not counts.any():
                raise AttentionError(
                    f"No step lies between {start:g} and {end:g} of this sampling. Widen the range."
                )
            weights = (counts / counts.sum())[:, None, None, None, None]
            shown.append((weights * self.means[size][first:last]).sum(0))
        finest = shown[0].shape[-2:]
        resized = [F.interpolate(one, finest, mode="bilinear") for one in shown]
        return torch.stack(resized).mean(0)


class AttentionRecorder:
    """Records by forward hooks of cross-attention modules, while `rows` has any."""

    def __init__(self, words: Sequence[WatchedWord]) -> None:
        if not 1 <= len(words) <= MOST_WORDS:
            raise AttentionError(f"{len(words)} words are watched; 1 to {MOST_WORDS} can be.")
        self.words = words
        self.rows: Sequence[int] = ()
        """Of the batch that is predicted: those with the watched prompt, one a picture"""
        self.size = (0, 0)
        """Height and width of the latents"""
        self.progress = 0.0
        """Where in the sampling it is: 0 its first step, 1 its end"""
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._counts: dict[tuple[int, int], Tensor] = {}

    def begin(self) -> None:
        """Forgets what was recorded."""
        self._sums, self._counts, self.rows = {}, {}, ()

    @torch.no_grad()
    def hook(
        self, module: Any, args: tuple[Any, ...], named: Mapping[str, Any], output: Tensor
    ) -> None:
        """For `register_forward_hook(..., with_kwargs=True)` of a cross-attention module of
        ComfyUI or diffusers.
        """
        if not self.rows:
            return
        context = named.get("context", named.get("encoder_hidden_states"))
        size = level_of(output.shape[1], *self.size)
        queries = module.to_q(args[0][self.rows])
        keys = module.to_k(context)[self.rows]  # of all: routes are added by place in the batch
        columns = [list(word.positions) for word in self.words]
        seen = torch.stack(
            [
                word_shares(query, key, module.heads, columns)
                for query, key in zip(queries, keys, strict=True)
            ]
        ).unflatten(-1, size)
        part = min(int(self.progress * PARTS), PARTS - 1)
        if size not in self._sums:
            self._sums[size] = seen.new_zeros(PARTS, *seen.shape)
            self._counts[size] = torch.zeros(PARTS)
        self._sums[size][part] += seen
        self._counts[size][part] += 1

    def maps(self) -> AttentionMaps:
        """Raises AttentionError where nothing was recorded."""
        if not self._sums:
            raise AttentionError(
                "No attention was recorded. Both the MODEL and the CONDITIONING (as the positive "
                "prompt) of Watch Attention must reach the sampler that draws these pictures."
            )
        means = {
            size: total.cpu() / self._counts[size].clamp(min=1).view(-1, 1, 1, 1, 1)
            for size, total in self._sums.items()
        }
        words = [word.text for word in self.words]
        return AttentionMaps(words, means, dict(self._counts), self.size)


def word_shares(query: Tensor, key: Tensor, heads: int, columns: Sequence[Sequence[int]]) -> Tensor:
    """The share of attention (words, p), float32, that each place pays to each word.

    `query` is (p, heads · d), `key` (n, heads · d), `columns` the rows of `key` of each word.
    """
    q, k = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in (query, key))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(1, 2)
    # The softmax's denominator, and exponentials of the watched columns alone.
    total = scores.logsumexp(-1, keepdim=True).float()
    return torch.stack(
        [(scores[..., own].float() - total).exp().sum(-1).mean(0) for own in columns]
    )


def overlap(one: Tensor, two: Tensor) -> float:
    """How much two words (h, w) look at the same place: 0 at different ones, 1 at the same.

    Σ min / Σ max of both maps between their own smallest and largest value, since every place pays
    some attention to every word.
    """
    a, b = (_stretched(one), _stretched(two))
    return float(torch.minimum(a, b).sum() / torch.maximum(a, b).sum().clamp(min=1e-12))


def overlaps(maps: Tensor) -> dict[tuple[int, int], float]:
    """Of each two words of maps (b, words, h, w), the mean over the pictures."""
    return {
        (i, j): sum(overlap(picture[i], picture[j]) for picture in maps) / len(maps)
        for i, j in combinations(range(maps.shape[1]), 2)
    }


def _halved(size: tuple[int, int], halvings: int) -> tuple[int, int]:
    h, w = size
    for _ in range(halvings):
        h, w = -(-h // 2), -(-w // 2)
    return h, w


def _stretched(one: Tensor) -> Tensor:
    low, high = one.min(), one.max()
    return (one - low) / (high - low).clamp(min=1e-12)
