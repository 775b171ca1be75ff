"""Regions: in one pass of the network each place of the picture reads its own prompt.

    out = Σ_r s_r A(Q, K_r, V_r) + (1 - Σ_r s_r) A(Q, K, V)

A is cross-attention, K and V the keys and values of the prompt for the whole picture, K_r and V_r
those of region r's own prompt with its own concept at its own words (`routing.py`), and s_r how
much of a place is region r's. Places read their own words only, so what stands in one region cannot
take looks from another's words (after attention couple and Mix-of-Show's regional sampling, Gu et
al., NeurIPS 2023). Nothing is merged. A place outside a region is not computed for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..concept.concept import ModifierToken
from ..concept.errors import CustomDiffusionError
from ..diffusion.levels import level_of
from .routing import Route, Router

Attend = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Any]], Tensor]
"""(module, x (b, p, c), context (b, n, d), the call's other arguments) → (b, p, c)"""


class RegionError(CustomDiffusionError):
    """A region that cannot be drawn."""


@dataclass(frozen=True)
class Region:
    """A part of a picture with a prompt and, at its words, a concept of its own."""

    prompt: str
    """Empty for that of the whole picture"""
    mask: Tensor
    """(h, w) of any size in 0..1, over the whole picture"""
    route: Route | None = None
    """Its concept, which alone acts in it"""


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


def box(left: float, top: float, width: float, height: float, edge: int = 512) -> Tensor:
    """A mask (edge, edge) of the part of a picture that lies in a box; all in shares of it.

    Edges between two pixels count partly. Raises RegionError for a box without a part in it.
    """
    x, y = (
        (
            torch.arange(1, edge + 1).clamp(max=(begin + size) * edge)
            - torch.arange(edge).clamp(min=begin * edge)
        ).clamp(0, 1)
        for begin, size in ((left, width), (top, height))
    )
    mask = y[:, None] * x[None, :]
    if not mask.any():
        raise RegionError(
            f"The box at {left:g}, {top:g}, {width:g} wide and {height:g} high, has no part in the "
            "picture. All four are shares of the picture: 0.5 is the middle, a half."
        )
    return mask


def single_mask(masks: Tensor) -> Tensor:
    """The mask (h, w) of a batch of one (1, h, w), or of a mask alone.

    Raises RegionError for several, and for an empty one.
    """
    mask = masks.reshape(-1, *masks.shape[-2:]).float()
    if len(mask) != 1:
        raise RegionError(
            f"{len(mask)} masks were given for one region; one is needed. Choose one of them, or "
            "make a region of each."
        )
    return _checked(mask[0], "of a region")


def feathered(mask: Tensor, feather: float) -> Tensor:
    """A mask (h, w) whose edge fades over `feather` of the shorter side of the picture."""
    radius = round(feather * min(mask.shape) / 2)
    if radius < 1:
        return mask
    soft = mask[None, None]
    for _ in range(2):  # twice a mean: the edge fades without corners
        soft = F.pad(soft, (radius,) * 4, mode="replicate")
        soft = F.avg_pool2d(soft, 2 * radius + 1, stride=1)
    return soft[0, 0]


def shared(masks: Sequence[Tensor], edge: int = 512) -> Tensor:
    """Shares (r, edge, edge) of masks of any size; where they overlap, each gives way alike.

    Raises RegionError for an empty one, or numbers out of 0..1.
    """
    checked = [_checked(mask, f"of region {number}") for number, mask in enumerate(masks, 1)]
    resized = [_resized(mask[None].float(), edge, edge) for mask in checked]
    square = torch.cat([torch.zeros(0, edge, edge), *resized])
    return square / square.sum(0).clamp(min=1)


def _checked(mask: Tensor, of_what: str) -> Tensor:
    if not mask.isfinite().all() or mask.min() < 0 or mask.max() > 1:
        raise RegionError(f"The mask {of_what} has numbers outside of 0 to 1.")
    if not mask.any():
        raise RegionError(
            f"The mask {of_what} is empty: nothing would be drawn there. Paint it, or leave the "
            "region out."
        )
    return mask


@dataclass
class RegionPrompts:
    """What the regions of one picture say, and where they are."""

    contexts: Sequence[Tensor]
    """Text features (n, d) of each region's prompt"""
    shares: Tensor
    """(r, h, w), as `shared` makes them"""
    index: Sequence[Tensor]
    """Numbers (n,) of each prompt's rows for the router"""
    _at: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def to(self, device: torch.device, dtype: torch.dtype) -> RegionPrompts:
        """Features in `dtype`; the rest keeps its own."""
        return RegionPrompts(
            [context.to(device, dtype) for context in self.contexts],
            self.shares.to(device),
            [index.to(device) for index in self.index],
        )

    def at(self, height: int, width: int) -> list[tuple[Tensor, Tensor]]:
        """Of each region the places (p,) of a grid, row by row, at which it counts, and its shares
        (p,) there.
        """
        if (height, width) not in self._at:
            flat = _resized(self.shares, height, width).flatten(1)
            places = [share.nonzero()[:, 0] for share in flat]
            self._at[height, width] = [(p, s[p]) for p, s in zip(places, flat, strict=True)]
        return self._at[height, width]


class RegionalAttention:
    """Mixes the regions' prompts into what cross-attention puts out, by forward hooks.

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
            queries = args[0][rows]
            for place, (places, share) in enumerate(regions.at(*grid)):
                if not len(places):
                    continue  # too small for this level
                context = regions.contexts[place].expand(len(rows), -1, -1)
                with self._rows(regions, place, len(rows)):
                    own = self.attend(module, queries[:, places], context, named)
                more = share.to(output)[:, None] * (own - output[rows][:, places])
                for row, change in zip(rows, more, strict=True):
                    mixed[row, places] += change
        return mixed

    @contextmanager
    def _rows(self, regions: RegionPrompts, place: int, count: int) -> Iterator[None]:
        """The router knows the rows of this region's prompt, and afterwards those of the whole."""
        whole = self.router.index
        self.router.index = regions.index[place].expand(count, -1)
        try:
            yield
        finally:
            self.router.index = whole


def _resized(masks: Tensor, height: int, width: int) -> Tensor:
    """(r, h, w) as means of what each cell covers."""
    return F.adaptive_avg_pool2d(masks[None], (height, width))[0]
