"""The part of Eq. 5 that every layer shares: one factorisation, one small matrix P.

With G = C_regᵀ C_reg + λI = RᵀR and D_n the change that concept n makes to a projection, Eq. 5
becomes

    W = W₀ + E P,   P = (C G⁻¹ Cᵀ)⁻¹ C G⁻¹,   E = [D_1 C_1ᵀ | D_2 C_2ᵀ | …]

where only E depends on the layer (docs/algorithms.md). P comes from the singular value
decomposition of Z = C R⁻¹, which also tells how well the constraints can be told apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..concept.errors import MergeError

EXACT_CONDITION_LIMIT = 30.0
"""Above this condition number of Z the constraints are damped instead of met exactly."""
DAMPING = 1e-3
"""μ of the damped inverse S / (S² + μ S₁²)."""


@dataclass(frozen=True)
class CaptionFactor:
    """`upper` R (d, d), float64, with RᵀR = C_regᵀ C_reg + λI: all that a merge needs of the
    captions.
    """

    upper: Tensor
    captions: int


def caption_factor(features: Tensor, captions: int, relative_ridge: float) -> CaptionFactor:
    """Factorises caption features (n, d) by QR in float64: the Gram matrix would square their
    condition.

    λ is `relative_ridge` times the mean squared feature, tr(C_regᵀ C_reg) / d. Raises MergeError
    when the features do not span all d dimensions and there is no ridge to make up for it.
    """
    rows = features.to(torch.float64)
    width = rows.shape[1]
    if relative_ridge > 0:
        ridge = relative_ridge * float(rows.square().sum()) / width
        rows = torch.cat([rows, ridge**0.5 * torch.eye(width, dtype=torch.float64)])
    if len(rows) < width:
        raise MergeError(
            f"{captions} regularization captions give {len(features)} rows of text features, "
            f"needed are at least {width}. Give more captions, or a relative ridge above 0."
        )
    upper = torch.linalg.qr(rows, mode="r").R
    diagonal = upper.diagonal().abs()
    if float(diagonal.min()) <= width * torch.finfo(torch.float64).eps * float(diagonal.max()):
        raise MergeError(
            f"The {captions} regularization captions do not span all {width} dimensions of the "
            "text features. Give more, and more varied, captions, or a relative ridge above 0."
        )
    return CaptionFactor(upper.contiguous(), captions)


@dataclass(frozen=True)
class Projector:
    """P in factored form: `left` (s, r) times `rows` (r, d), orthonormal, r = min(s, d).

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


def constraint_projector(factor: CaptionFactor, constraints: Tensor) -> Projector:
    """P for constraint rows (s, d): exact when they can be told apart, damped when they nearly
    coincide.
    """
    c = constraints.to(torch.float64)
    z = torch.linalg.solve_triangular(factor.upper, c, upper=True, left=False)
    u, singular, vh = torch.linalg.svd(z, full_matrices=False)
    smallest = float(singular[-1]) if len(singular) == len(c) else 0.0
    condition = float(singular[0]) / smallest if smallest > 0 else float("inf")
    damped = condition > EXACT_CONDITION_LIMIT
    mu = DAMPING if damped else 0.0
    inverse = singular / (singular.square() + mu * singular[0].square())
    p = (u * inverse) @ torch.linalg.solve_triangular(factor.upper, vh.T, upper=True).T
    q, r = torch.linalg.qr(p.T)
    return Projector(left=r.T, rows=q.T, condition=condition, damped=damped)
