"""How far two sets of pictures are apart: KID and FID, on features (n, d) of any model.

Published figures are of Inception features without normalising; others compare with themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..concept.errors import DataError, IncompatibleModelError

SUBSETS, SUBSET_SIZE = 100, 1000
_ROWS = 1024
"""Of a kernel matrix that are in memory at once"""


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """KID of all pictures: the squared maximum mean discrepancy, unbiased (so it may be below 0),
    with the kernel (aᵀb / d + 1)³. Bińkowski et al. 2018, Demystifying MMD GANs, Eq. 4.

    Raises DataError for fewer than two pictures on a side.
    """
    x, y = _checked(x, y)
    return _within(x) + _within(y) - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def subset_kernel_distance(
    x: Tensor, y: Tensor, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0
) -> tuple[float, float]:
    """KID as it is published: mean and standard deviation of that of random subsets of equal size,
    at most as many pictures as the smaller side has.
    """
    size = min(size, len(x), len(y))
    generator = torch.Generator().manual_seed(seed)
    found = [
        kernel_distance(*(f[torch.randperm(len(f), generator=generator)[:size]] for f in (x, y)))
        for _ in range(subsets)
    ]
    values = torch.tensor(found, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d) of features, in float64."""

    mean: Tensor
    covariance: Tensor
    count: int

    @staticmethod
    def of(batches: Iterable[Tensor]) -> Moments:
        """Of features (b, d), a batch at a time: only d² numbers stay (Chan et al. 1979)."""
        count, mean, scatter = 0, torch.zeros(0), torch.zeros(0)
        for batch in (one.double() for one in batches if len(one)):
            own = batch.mean(0)
            own_scatter = (batch - own).T @ (batch - own)
            if not count:
                count, mean, scatter = len(batch), own, own_scatter
                continue
            total, gap = count + len(batch), own - mean
            scatter = scatter + own_scatter + torch.outer(gap, gap) * (count * len(batch) / total)
            mean, count = mean + gap * (len(batch) / total), total
        if count < 2:
            raise _too_few(count)
        return Moments(mean, scatter / (count - 1), count)


def frechet_distance(one: Moments, other: Moments) -> float:
    """FID: |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½). Heusel et al. 2017.

    tr (Σ₁ Σ₂)^½ is that of the symmetric (Σ₁^½ Σ₂ Σ₁^½)^½, whose eigenvalues are real and not
    negative, so that covariances of fewer pictures than numbers need no help.
    """
    _check_widths(len(one.mean), len(other.mean))
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp(min=0).sqrt().sum()
    spread = one.covariance.trace() + other.covariance.trace() - 2 * shared
    return float((one.mean - other.mean).square().sum() + spread)


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    _check_widths(x.shape[1], y.shape[1])
    if min(len(x), len(y)) < 2:
        raise _too_few(min(len(x), len(y)))
    return x.double(), y.double()


def _within(x: Tensor) -> float:
    """The mean kernel of two different pictures of one set."""
    diagonal = float(_kernel(x.square().sum(1), x.shape[1]).sum())
    return (_kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    return sum(float(_kernel(rows @ y.T, x.shape[1]).sum()) for rows in x.split(_ROWS))


def _kernel(products: Tensor, width: int) -> Tensor:
    return (products / width + 1) ** 3


def _check_widths(one: int, other: int) -> None:
    if one != other:
        raise IncompatibleModelError(
            f"Features of {one} and of {other} numbers were given; they come from two feature "
            f"models. Compare pictures by one and the same."
        )


def _too_few(count: int) -> DataError:
    return DataError(
        f"{count} pictures have no spread, so there is no distance (KID, FID) between sets. Give "
        f"at least two on either side; some hundred make it a good figure."
    )
