"""Low-rank factors whose inputs are fixed and disjoint, so that concepts can be added up.

Orthogonal Adaptation (Po et al., CVPR 2024, arXiv 2312.02432): of a change A Bᵀ only A learns.
Every concept has its own B, some columns of one orthogonal matrix that everybody shares, so that of
two concepts B_iᵀ B_j = 0 and neither reads what the other reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...concept.delta import Delta
from ...concept.errors import ConfigError
from ...diffusion.protocols import Denoiser
from .projections import LowRankProjections, low_rank_factors

_SHARED_SEED = 2312_02432
"""Of the orthogonal matrix; another one would not be disjoint with concepts that exist"""
_NORM = 1 / math.sqrt(3)
"""Of a row, as LoRA draws them on average, so that the same learning rate suits"""
_SAME = 1e-2
"""Relative distance up to which a basis is the same: files are rounded to half precision"""


def disjoint_basis(width: int, rank: int, number: int) -> Tensor:
    """Rows (rank, width) of basis `number`, counted from 1; those of other numbers are orthogonal
    to them where the rank is the same. Raises ConfigError where the width has no room for it.
    """
    most = width // rank
    if number > most:
        raise ConfigError(
            f"Basis {number} of rank {rank} does not exist: this model's text features have "
            f"{width} dimensions, room for {most}. Choose a basis up to {most}, or a lower rank."
        )
    generator = torch.Generator().manual_seed(_SHARED_SEED)
    drawn = torch.randn(width, width, generator=generator, dtype=torch.float64)
    columns = torch.linalg.qr(drawn[:, : number * rank]).Q[:, -rank:]
    rows: Tensor = _NORM * columns.T
    return rows.float()


class DisjointProjections(LowRankProjections):
    """`up` learns, `down` is one fixed basis for every layer. What was learnt before must have the
    same basis.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        earlier: Mapping[str, Delta],
        rank: int,
        seed: int,
        basis: int,
    ) -> None:
        super().__init__(denoiser, earlier, rank, seed)
        rows = disjoint_basis(self.down.shape[1], rank, basis)
        up = torch.zeros_like(self.up)
        for layer, part in zip(self._layers, up.split(self._sizes), strict=True):
            if layer in earlier:
                before = low_rank_factors(earlier[layer], layer, rank)
                part.copy_(_in_basis(before.up.float() @ before.down.float(), rows, layer, basis))
        self.up.data.copy_(up)
        self.down = nn.Parameter(
            rows.repeat(len(self._sizes), 1).to(self.down.device), requires_grad=False
        )

    def parameters(self) -> list[nn.Parameter]:
        return [self.up]


def _in_basis(change: Tensor, rows: Tensor, layer: str, basis: int) -> Tensor:
    """The factor (out, rank) of a change before these rows. Raises ConfigError where it is not made
    of them.
    """
    up = change @ rows.T / _NORM**2
    if (up @ rows - change).norm() > _SAME * change.norm():
        raise ConfigError(
            f"The concept to extend was not trained in basis {basis} ({layer} for one). Set basis "
            "to the number that it was trained with, or to 0."
        )
    return up
