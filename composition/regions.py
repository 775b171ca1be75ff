"""Regions: in one pass of the network each place of the picture reads its own prompt.

    out = Σ_r s_r A(Q, K_r, V_r) + (1 - Σ_r s_r) A(Q, K, V)

A is cross-attention, K and V the keys and values of the prompt for the whole picture, K_r and V_r
those of region r's own prompt with its own concept at its own words (`routing.py`), and s_r how
much of a place is region r's (`places.py`). Places read their own words only, so what stands in one
region cannot take looks from another's words (after attention couple and Mix-of-Show's regional
sampling, Gu et al., NeurIPS 2023). Nothing is merged. A place outside a region is not computed for
it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..concept.concept import ModifierToken
from ..diffusion.levels import level_of
from .masks import RegionError
from .places import Places
from .routing import Route, Router

Attend = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Any]], Tensor]
"""(module, x (b, p, c), context (b, n, d), the call's other arguments) → (b, p, c)"""


MOST_REGIONS = 8


@dataclass(frozen=True)
class Region:
    """A part of a picture with a prompt and, at its words, a concept of its own."""

    prompt: str
    """Empty for that of the whole picture"""
    mask: Tensor | None
    """(h, w) of any size in 0..1, over the whole picture; None to find it while drawing"""
    route: Route | None = None
    """Its concept, which alone acts in it"""
    feather: float = 0.0
    """How far the edge of a place that is found fades, as `feathered` counts"""


def check_count(regions: Sequence[Region]) -> None:
    """Raises RegionError for none, or more than there are inputs for."""
    if not 1 <= len(regions) <= MOST_REGIONS:
        raise RegionError(
            f"{len(regions)} regions were given; 1 to {MOST_REGIONS} can be drawn in one picture. "
            "Leave some out, or route concepts without a place with Route Concepts."
        )


def said_in(region: Region, whole: str, regions: Sequence[Region]) -> str:
    """What is said in a region: its own prompt, else that of the whole picture, in which the
    concepts of other regions are anything of their class.
    """
    if region.prompt.strip():
        return region.prompt
    own = {token.name for token in _tokens(region)}
    others = {token.name for other in regions for token in _tokens(other)} - own
    for name in sorted(others, key=len, reverse=True):
        whole = re.sub(rf"{re.escape(name)}\s*", "", whole)
    return whole


def _tokens(region: Region) -> Sequence[ModifierToken]:
    return region.route.concept.tokens if region.route is not None else ()


@dataclass
class RegionPrompts:
    """What the regions of one prompt say, and where they are in its pictures."""

    contexts: Sequence[Tensor]
    """Text features (n, d) of each region's prompt"""
    places: Places
    index: Sequence[Tensor]
    """Numbers (n,) of each prompt's rows for the router"""
    columns: Sequence[Sequence[int]] = ()
    """Of each region that is sought: the rows of the whole prompt that are its concept's words"""
    pooled: Sequence[Tensor | None] = ()
    """Of each region's prompt (d',), where the network reads it"""

    def to(self, device: torch.device, dtype: torch.dtype) -> RegionPrompts:
        """Features in `dtype`; the rest keeps its own."""
        self.places.to(device)
        return replace(
            self,
            contexts=[context.to(device, dtype) for context in self.contexts],
            index=[index.to(device) for index in self.index],
        )


class RegionalAttention:
    """Mixes the regions' prompts into what cross-attention puts out, by forward hooks, and watches
    the words of regions whose place is sought.

    While `chosen` is empty, attention is as it is.
    """

    def __init__(self, router: Router, attend: Attend) -> None:
        self.router = router
        self.attend = attend
        self.sets: Sequence[RegionPrompts] = ()
        self.chosen: Sequence[int] = ()
        """For each picture of the batch: which of the sets it has, from 1 on, 0 for none"""
        self.size = (0, 0)
        """Height and width of the latents"""

    def settle(self, progress: float) -> None:
        """Before a prediction: places of which enough was seen are found. 0 is the first step."""
        for regions in self.sets:
            regions.places.settle(progress)

    def hook(
        self, module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any], output: Tensor
    ) -> Tensor:
        """For `register_forward_hook(..., with_kwargs=True)` of a cross-attention module."""
        if not any(self.chosen):
            return output
        grid = level_of(output.shape[1], *self.size)
        mixed = output.clone()
        for number, regions in enumerate(self.sets, 1):
            rows = [b for b, chosen in enumerate(self.chosen) if chosen == number]
            if not rows:
                continue
            if regions.places.seeks:
                self._watch(module, regions, args[0], named, rows, grid)
            parts = regions.places.at(*grid)
            # Pictures that have their places each for itself stand in the order of the batch.
            alike = [rows] if len(parts) == 1 else [[row] for row in rows]
            for picture, same in enumerate(alike):
                self._mix(module, regions, parts[picture % len(parts)], args[0], named, same, mixed)
        return mixed

    def _mix(
        self,
        module: nn.Module,
        regions: RegionPrompts,
        parts: Sequence[tuple[Tensor, Tensor]],
        x: Tensor,
        named: Mapping[str, Any],
        rows: Sequence[int],
        mixed: Tensor,
    ) -> None:
        """Adds to `mixed` (b, p, c), which has the whole prompt, what the regions say at these
        places of pictures that have the same.
        """
        queries, whole = x[rows], mixed[rows]
        for place, (places, share) in enumerate(parts):
            if not len(places):
                continue  # too small for this level, or not found yet
            context = regions.contexts[place].expand(len(rows), -1, -1)
            with self._rows(regions, place, len(rows)):
                own = self.attend(module, queries[:, places], context, named)
            more = share.to(mixed)[:, None] * (own - whole[:, places])
            for row, change in zip(rows, more, strict=True):
                mixed[row, places] += change

    def _watch(
        self,
        module: Any,
        regions: RegionPrompts,
        x: Tensor,
        named: Mapping[str, Any],
        rows: Sequence[int],
        grid: tuple[int, int],
    ) -> None:
        context = named.get("context", named.get("encoder_hidden_states"))
        keys = module.to_k(context)[rows]  # of all: routes are added by place in the batch
        regions.places.record(module, module.to_q(x[rows]), keys, regions.columns, grid)

    @contextmanager
    def _rows(self, regions: RegionPrompts, place: int, count: int) -> Iterator[None]:
        """The router knows the rows of this region's prompt, and afterwards those of the whole."""
        whole = self.router.index
        self.router.index = regions.index[place].expand(count, -1)
        try:
            yield
        finally:
            self.router.index = whole
