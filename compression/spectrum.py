"""Singular values of what a concept changes: what compression cuts, and what people look at to
choose how far (the paper's Fig. 12).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..concept.concept import Concept
from ..concept.delta import Delta, LowRankDelta

_GRAM_BLOCKS = 4
_TINY = torch.finfo(torch.float32).tiny
_FINE = 1e-4
"""Share of the energy below which what is left out is not told from what is kept in float32."""
_NOTHING = 1e-7
"""Share of the largest singular value below which there is only float32 rounding."""


@dataclass(frozen=True)
class Components:
    """A delta as a sum of rank-one parts, largest first."""

    delta: Delta
    values: Tensor
    """(n,) singular values in float64; of a delta that is zero, none"""
    basis: Tensor
    """(side, n) singular vectors of the shorter side, of factors those of the output"""

    def leading(self, rank: int) -> LowRankDelta:
        """The `rank` largest parts: no matrix of that rank is nearer (Eckart and Young 1936).

        A part's size is shared by its two factors, so that neither is small in half precision.
        """
        basis, transposed = self.basis[:, :rank], False
        if (factors := self.delta.factors) is not None:
            across = (basis.T @ factors.up.to(basis)) @ factors.down.to(basis)
        else:
            wide, transposed = _wide(self.delta)
            energies = self.values.square()
            if energies[rank:].sum() < _FINE * energies.sum():
                wide = wide.double()
                basis = _left_vectors(wide)[1][:, :rank]
            across = basis.T @ wide
        size = across.norm(dim=1).sqrt().clamp_min(_TINY)
        along, across = (basis * size).float(), (across / size[:, None]).float()
        if transposed:
            return LowRankDelta(across.T.contiguous(), along.T.contiguous())
        return LowRankDelta(along, across)


@torch.no_grad()
def components(delta: Delta) -> Components:
    """The singular value decomposition, by eigenvectors of the smaller Gram matrix in float32.

    Several times as fast as an SVD of the whole matrix. Squaring costs half of the digits: values
    are known to some 3e-4 of the largest, the large ones better. `Components.leading` takes float64
    where it leaves so little that this would be seen. Factors are decomposed in float64 through
    their triangular parts, and exactly.
    """
    if (factors := delta.factors) is not None:
        outer, triangle = torch.linalg.qr(factors.up.double())
        inner = triangle @ torch.linalg.qr(factors.down.double().T).R.T
        left, values, _ = torch.linalg.svd(inner, full_matrices=False)
        basis = outer @ left
    else:
        wide, _ = _wide(delta)
        # Neither tiny nor huge changes leave the range of float32 when they are squared.
        scale = wide.abs().max().clamp_min(_TINY)
        values, basis = _left_vectors(wide / scale)
        values = values.double() * scale
    kept = int((values > _NOTHING * values[0]).sum())
    return Components(delta, values[:kept], basis[:, :kept])


@torch.no_grad()
def singular_values(delta: Delta) -> Tensor:
    """(rank or min(out, in),) in float64, largest first; exact to about 1e-8 of the largest.

    Of the smaller Gram matrix, which is several times as fast as an SVD of the whole matrix; of
    factors through their triangular parts, without building the matrix.
    """
    if (factors := delta.factors) is not None:
        up, down = factors.up.double(), factors.down.double()
        inner = torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T
        values: Tensor = torch.linalg.svdvals(inner)
        return values
    matrix = delta.dense().double()
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    squares: Tensor = torch.linalg.eigvalsh(gram)
    return squares.clamp_min(0).sqrt().flip(0)


def spectra(concept: Concept) -> dict[str, Tensor]:
    """`singular_values` of every layer, in the concept's order."""
    return {layer: singular_values(concept.deltas[layer]) for layer in concept.layers}


def _wide(delta: Delta) -> tuple[Tensor, bool]:
    """The matrix in float32 with its shorter side first, and whether that is its transpose."""
    matrix = delta.dense().float()
    transposed = len(matrix) > matrix.shape[1]
    return (matrix.T if transposed else matrix), transposed


def _left_vectors(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, largest first, and vectors of the side that `wide` (n, m) has first."""
    squares, vectors = torch.linalg.eigh(_lower_gram(wide))
    return squares.clamp_min(0).sqrt().flip(0), vectors.flip(1)


def _lower_gram(rows: Tensor) -> Tensor:
    """rows rowsᵀ (n, n) on and below the diagonal, which is all that `eigh` reads."""
    count = len(rows)
    gram = rows.new_zeros(count, count)
    step = -(-count // _GRAM_BLOCKS)
    for start in range(0, count, step):
        end = min(start + step, count)
        gram[start:end, :end] = rows[start:end] @ rows[:end].T
    return gram
