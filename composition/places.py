"""Where the regions of a picture are: given as masks, or found while it is drawn.

Early steps decide where things are. During them the cross-attention of each concept's words is
watched, and each place is then that concept's whose words it looks at more than elsewhere (the idea
of FreeFuse, arXiv 2510.23515, with a concept's own words to look for).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.maps import word_shares
from .masks import RegionError, feathered, resized, shared

FOUND_AT = 0.2
"""The part of the sampling after which places are found. In TweedieMix (Kwon et al., ICLR 2025) the
first fifth sets the layout; not tuned.
"""
_EDGE = 128
"""Of found masks"""


class Places:
    """The regions of one prompt in its pictures.

    `masks` has one (h, w) of any size for each region, or None where it is to be found; `feathers`
    the width of the fading edge of what is found.
    """

    def __init__(
        self,
        masks: Sequence[Tensor | None],
        feathers: Sequence[float] = (),
        found_at: float = FOUND_AT,
    ) -> None:
        self.masks = masks
        self.feathers = feathers or [0.0] * len(masks)
        self.found_at = found_at
        self.sought = [number for number, mask in enumerate(masks) if mask is None]
        self._given = shared([mask for mask in masks if mask is not None])
        self.begin()

    def begin(self) -> None:
        """Forgets what was found."""
        self.shares = torch.zeros(1, len(self.masks), *self._given.shape[1:])
        self.shares[0, [n for n, mask in enumerate(self.masks) if mask is not None]] = self._given
        self.seeks = bool(self.sought)
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._counts: dict[tuple[int, int], int] = {}
        self._levels: dict[tuple[int, int], list[list[tuple[Tensor, Tensor]]]] = {}

    @torch.no_grad()
    def record(
        self,
        module: Any,
        queries: Tensor,
        keys: Tensor,
        columns: Sequence[Sequence[int]],
        grid: tuple[int, int],
    ) -> None:
        """What one cross-attention looks at, of pictures (b, p, c) with the keys (b, n, c) of their
        prompt; `columns` has the rows of the words of each concept that is sought.
        """
        seen = torch.stack(
            [word_shares(q, k, module.heads, columns) for q, k in zip(queries, keys, strict=True)]
        ).unflatten(-1, grid)
        if grid in self._sums:
            self._sums[grid] += seen
        else:
            self._sums[grid] = seen
        self._counts[grid] = self._counts.get(grid, 0) + 1

    def settle(self, progress: float) -> None:
        """Finds what is sought, where enough was seen; `progress` is 0 at the first step."""
        if self.seeks and self._sums and progress >= self.found_at:
            found = self._found()
            self.seeks = False
            self._sums.clear()
            given = resized(self.shares[0].to(found), *found.shape[-2:])
            self.shares = given.repeat(len(found), 1, 1, 1)
            self.shares[:, self.sought] = found * (1 - given.sum(0)).clamp(min=0)
            self._levels.clear()

    def to(self, device: torch.device) -> None:
        self.shares = self.shares.to(device)
        self._levels.clear()

    def shares_at(self, height: int, width: int) -> Tensor:
        """Shares (b, r, height, width) of every region; b is 1 where all pictures have the same."""
        return F.adaptive_avg_pool2d(self.shares, (height, width))

    def at(self, height: int, width: int) -> list[list[tuple[Tensor, Tensor]]]:
        """Of each picture and each region the places (p,) of a grid, row by row, at which it
        counts, and its shares (p,) there; one list where all pictures have the same.
        """
        key = (height, width)
        if key not in self._levels:
            flat = self.shares_at(height, width).flatten(2)
            places = [[share.nonzero()[:, 0] for share in picture] for picture in flat]
            self._levels[key] = [
                [(p, s[p]) for p, s in zip(*each, strict=True)]
                for each in zip(places, flat, strict=True)
            ]
        return self._levels[key]

    def of_pictures(self, count: int, height: int, width: int) -> Tensor:
        """Shares (count, r, height, width) on the CPU, of as many pictures.

        Raises RegionError where nothing was found yet, or in another number of pictures.
        """
        if self.seeks:
            raise RegionError(
                "The regions were not found: no picture was drawn with them yet, or too few steps. "
                "Connect the pictures that the sampler draws with Apply Regions."
            )
        if len(self.shares) not in (1, count):
            raise RegionError(
                f"{count} pictures were given, and regions were found in {len(self.shares)}. "
                "Connect the pictures that were drawn with these regions."
            )
        shares = F.interpolate(self.shares.float().cpu(), (height, width), mode="bilinear")
        return shares.expand(count, -1, -1, -1)

    def _found(self) -> Tensor:
        """(b, sought, h, w)"""
        finest = max(self._sums)
        means = [
            F.interpolate(total.float() / self._counts[grid], finest, mode="bilinear")
            for grid, total in self._sums.items()
        ]
        masks = divided(torch.stack(means).mean(0), alone=len(self.masks) == 1)
        feathers = [self.feathers[number] for number in self.sought]
        soft = [
            torch.stack([feathered(m, f) for m, f in zip(picture, feathers, strict=True)])
            for picture in masks
        ]
        return F.adaptive_avg_pool2d(torch.stack(soft), (_EDGE, _EDGE))


def divided(maps: Tensor, alone: bool = False) -> Tensor:
    """Masks (b, r, h', w') of zeros and ones from the attention (b, r, h, w) of each concept.

    Each place is that concept's whose words it looks at most, measured by how the concept's
    attention varies over the picture, so that a word which is looked at much everywhere does not
    take all. A concept `alone` has the places that look at it more than the picture's mean.
    """
    h, w = maps.shape[-2:]
    factor = max(1, _EDGE // max(h, w))
    fine = F.interpolate(maps, (h * factor, w * factor), mode="bilinear")
    mean, deviation = fine.mean((2, 3), keepdim=True), fine.std((2, 3), keepdim=True)
    scores = (fine - mean) / deviation.clamp(min=1e-12)
    if alone:
        return (scores > 0).float()
    winners = scores.argmax(1, keepdim=True)
    return torch.zeros_like(scores).scatter_(1, winners, 1.0)
