"""Masks of regions: boxes, fading edges, and what overlapping ones share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..concept.errors import CustomDiffusionError


class RegionError(CustomDiffusionError):
    """A region that cannot be drawn."""


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
    squares = [resized(mask[None].float(), edge, edge) for mask in checked]
    square = torch.cat([torch.zeros(0, edge, edge), *squares])
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


def resized(masks: Tensor, height: int, width: int) -> Tensor:
    """(r, h, w) as means of what each cell covers."""
    return F.adaptive_avg_pool2d(masks[None], (height, width))[0]
