"""The part of Eq. 5 that every layer shares: one factorisation, one small matrix P.

With G = C_regᵀ C_reg + λI = RᵀR and D_n the change that concept n makes to a projection, Eq. 5
becomes

    W = W₀ + E P,   P = (C G⁻¹ Cᵀ)⁻¹ C G⁻¹,   E = [D_1 C_1ᵀ | D_2 C_2ᵀ | …]

where only E depends on the layer (docs/algorithms.md). P comes from the singular value
decomposition of Z = C R⁻¹, which also tells how well the constraints can be told apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..concept.errors import MergeError

EXACT_CONDITION_LIMIT = 30.0
"""Above this condition number of Z the constraints are damped instead of met exactly."""
DAMPING = 1e-3
"""μ of the damped inverse S / (S² + μ S₁²)."""
LEAST_RIDGE_FOR_CHOLESKY = 1e-6
"""From this relative ridge on the condition of G is at most d / ridge, and Cholesky is accurate."""
_GRAM_BLOCK = 192


@dataclass(frozen=True)
class CaptionFactor:
    """`upper` R (d, d), float64, with RᵀR = C_regᵀ C_reg + λI: what a merge needs of captions."""

    upper: Tensor
    captions: int


def caption_factor(features: Tensor, captions: int, relative_ridge: float) -> CaptionFactor:
    """Factorises caption features (n, d) in float64.

    λ is `relative_ridge` times the mean squared feature, tr(C_regᵀ C_reg) / d. A ridge bounds the
    condition of G, so its Cholesky factor is accurate; without one R comes from the QR
    decomposition of C_reg, because G would square its condition.

    Raises MergeError when there is no ridge and the features do not span all d dimensions.
    """
    if relative_ridge >= LEAST_RIDGE_FOR_CHOLESKY:
        return CaptionFactor(_ridged_cholesky(features.double(), relative_ridge), captions)
    width = features.shape[1]
    rows = features.double()
    if relative_ridge > 0:
        ridge = relative_ridge * float(rows.square().sum()) / width
        rows = torch.cat([rows, math.sqrt(ridge) * torch.eye(width, dtype=torch.float64)])
    if len(rows) < width:
        raise MergeError(
            f"{captions} regularization captions give {len(features)} rows of text features, "
            f"needed are at least {width}. Give more captions, or a relative ridge above 0."
        )
    upper = torch.linalg.qr(rows, mode="r").R
    diagonal = upper.diagonal().abs()
    rounding = torch.finfo(features.dtype).eps  # features carry the rounding of their own type
    if relative_ridge == 0 and float(diagonal.min()) <= width * rounding * float(diagonal.max()):
        raise MergeError(
            f"The {captions} regularization captions do not span all {width} dimensions of the "
            f"text features. Give more, and more varied, captions, or a relative ridge above 0."
        )
    return CaptionFactor(upper.contiguous(), captions)


def _ridged_cholesky(rows: Tensor, relative_ridge: float) -> Tensor:
    width = rows.shape[1]
    gram = torch.empty(width, width, dtype=torch.float64)
    for start in range(0, width, _GRAM_BLOCK):  # Cholesky reads the lower triangle only
        columns = slice(start, start + _GRAM_BLOCK)
        gram[start:, columns] = rows[:, start:].T @ rows[:, columns]
    gram.diagonal().add_(relative_ridge * float(gram.trace()) / width)
    lower: Tensor = torch.linalg.cholesky(gram)
    return lower.T.contiguous()


@dataclass(frozen=True)
class Projector:
    """P in factored form: `left` (s, r) times `rows` (r, d), orthonormal, r = min(s, d).

    Of constraints at which nothing changes P has no rows.

    Orthonormal rows keep half-precision files accurate: rounding errors do not cancel against each
    other.
    """

    left: Tensor
    rows: Tensor
    condition: float
    """Condition number of Z: how nearly dependent the constraints are."""
    damped: bool

    def dense(self) -> Tensor:
        return self.left @ self.rows


def constraint_projector(
    factor: CaptionFactor,
    constraints: Tensor,
    still: Tensor | None = None,
    softness: float = 0.0,
) -> Projector:
    """P for constraint rows (s, d): exact when they can be told apart, damped when they nearly
    coincide.

    With a `softness` μ above 0 they are wishes: P = (C G⁻¹ Cᵀ + μ S₁² I)⁻¹ C G⁻¹, the weighted
    least squares of Unified Concept Editing. `still` (s,) marks constraints at which nothing may
    change: they shape P, and its rows for them, which 0 would be multiplied by, are left out.
    """
    c = constraints.to(torch.float64)
    z = torch.linalg.solve_triangular(factor.upper, c, upper=True, left=False)
    u, singular, vh = torch.linalg.svd(z, full_matrices=False)
    smallest = float(singular[-1]) if len(singular) == len(c) else 0.0
    condition = float(singular[0]) / smallest if smallest > 0 else float("inf")
    damped = condition > EXACT_CONDITION_LIMIT or softness > 0
    mu = softness or (DAMPING if damped else 0.0)
    inverse = singular / (singular.square() + mu * singular[0].square())
    p = (u * inverse) @ torch.linalg.solve_triangular(factor.upper, vh.T, upper=True).T
    if still is not None:
        p, c = p[~still], c[~still]
    q, r = torch.linalg.qr(p.T)
    rows, left = q.T, r.T
    if not damped:
        # The rows are kept in float32: meet the constraints with them as rounded.
        rows = rows.float().double()
        left = torch.linalg.inv(rows @ c.T)
    return Projector(left, rows, condition, damped)
