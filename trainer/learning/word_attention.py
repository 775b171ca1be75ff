"""Words taught to keep their attention inside the mask of what they name (the term of Mix-of-Show,
Gu et al., NeurIPS 2023; DisenDiff, Zhang et al., CVPR 2024, has one of its kind).

At each level of the network, A is a word's share of the cross-attention, the mean over the level's
layers and their heads, and M the mask at that level in 0..1:

    term = Σ_p (A_p / max A) (1 − M_p) / Σ_p (1 − M_p)

the mean over the levels and over a sample's words. The trigger word and the class noun behind it
are two words. Queries are caught where the network computes them; the shares are computed a second
time for the backward pass, so nothing of their size, heads x places x positions, is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from ...concept.prompts import subject
from ...diffusion.levels import level_of
from ...diffusion.protocols import Denoiser
from .projections import KeyValueProjections


class WordPlaces(NamedTuple):
    """Where the words of some samples stand in their prompts, and may look in their pictures."""

    rows: Tensor
    """(b, words, n): one at a word's positions; of a word that is not there, or whose place in the
    picture is not known, none"""
    masks: Tensor
    """(b, words, h, w), in 0..1"""


def word_places(
    rows: Tensor,
    subjects: Sequence[tuple[str, str]],
    seen: Sequence[Mapping[str, Tensor]],
    masks_bhw: Tensor,
) -> WordPlaces:
    """Of prompts whose words stand at `rows` (b, 2 · concepts, n): each concept's trigger word and
    class noun. `seen` has the masks of each sample's subjects, by what they are called, as large as
    `masks_bhw`.
    """
    names = [subject(token, noun) for token, noun in subjects for _ in range(2)]
    everywhere = torch.ones_like(masks_bhw[0])
    masks = [torch.stack([of.get(name, everywhere) for name in names]) for of in seen]
    known = torch.tensor([[float(name in of) for name in names] for of in seen])
    return WordPlaces(rows * known[:, :, None].to(rows), torch.stack(masks).to(rows))


class WordAttention:
    """Catches the queries of a prediction and says how far its words look beside their masks."""

    def __init__(self, denoiser: Denoiser, projections: KeyValueProjections) -> None:
        self._network, self._projections = denoiser.network, projections
        paths = [path for path in denoiser.projections.values() if path.endswith("to_k")]
        self._layers = [path.removesuffix(".to_k") for path in paths]
        self._queries: dict[str, Tensor] = {}
        self._catching = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the context lasts the network's queries can be caught."""
        with ExitStack() as hooks:
            for layer in self._layers:
                module = self._network.get_submodule(f"{layer}.to_q")
                handle = module.register_forward_hook(partial(self._catch, layer))
                hooks.callback(handle.remove)
            yield

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Around a prediction: not around its backward pass, where blocks may be computed again."""
        self._queries, self._catching = {}, True
        try:
            yield
        finally:
            self._catching = False

    def terms(self, places: WordPlaces) -> Tensor:
        """Of each sample (b,) of the prediction that was caught: 0 where its words look at nothing
        but their masks, or have none.
        """
        levels: dict[tuple[int, int], list[Tensor]] = {}
        size = places.masks.shape[-2], places.masks.shape[-1]
        for layer, queries in self._queries.items():
            keys = self._projections.computed(f"{layer}.to_k")
            heads = int(getattr(self._network.get_submodule(layer), "heads"))  # noqa: B009
            shares = recompute(
                _shares,
                *(queries, keys, places.rows, heads),
                use_reentrant=False,
                preserve_rng_state=False,
            )
            levels.setdefault(level_of(queries.shape[1], *size), []).append(shares)
        self._queries = {}
        beside = [
            _beside(torch.stack(shares).mean(0).unflatten(-1, level), places.masks)
            for level, shares in levels.items()
        ]
        there = places.rows.any(-1).float()
        each = torch.stack(beside).mean(0) * there
        return each.sum(-1) / there.sum(-1).clamp_min(1)

    def _catch(self, layer: str, module: Any, inputs: Any, output: Tensor) -> None:
        if self._catching:
            self._queries[layer] = output


def _shares(queries: Tensor, keys: Tensor, rows: Tensor, heads: int) -> Tensor:
    """What share of its attention each place (b, words, p) pays to each word, over all heads."""
    q, k = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (queries, keys))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    attention: Tensor = scores.float().softmax(-1).mean(1)
    return rows.float() @ attention.transpose(-1, -2)


def _beside(shares: Tensor, masks: Tensor) -> Tensor:
    """(b, words) of shares (b, words, h, w) and masks of any size."""
    level = shares.shape[-2], shares.shape[-1]
    outside = 1 - F.adaptive_avg_pool2d(masks.float(), level)
    peaks = shares.amax((-2, -1), keepdim=True).clamp_min(1e-12)
    return (shares / peaks * outside).sum((-2, -1)) / outside.sum((-2, -1)).clamp_min(1e-6)
