"""Eq. 4-5 of Custom Diffusion for one matrix, in the paper's notation: the oracle of the batched
path.

min over W of ‖W C_regᵀ − W₀ C_regᵀ‖²   subject to   W Cᵀ = V

W = W₀ + vᵀ d,   d = C (C_regᵀ C_reg)⁻¹,   vᵀ = (V − W₀ Cᵀ)(d Cᵀ)⁻¹
"""

import torch
from torch import Tensor

from ..concept.errors import MergeError


def constrained_least_squares(
    weight: Tensor, regularization: Tensor, constraints: Tensor, targets: Tensor
) -> Tensor:
    """The matrix nearest to `weight` on the regularization captions that maps the constraints to
    the targets.

    Args:
        weight: W₀ (o, d), the base model's key or value projection.
        regularization: C_reg (n, d), text features of the regularization captions, full column
            rank.
        constraints: C (s, d), text features of the target words, linearly independent rows.
        targets: V (s, o), what each constraint row must be mapped to.

    Returns:
        W (o, d), in the dtype of `weight`; computed in float64.

    Raises:
        MergeError: shapes do not match, C_reg does not span the features, or constraints are
            dependent.
    """
    _check_shapes(weight, regularization, constraints, targets)
    w0, c_reg, c, v = (t.to(torch.float64) for t in (weight, regularization, constraints, targets))
    gram = c_reg.T @ c_reg
    if (rank := int(torch.linalg.matrix_rank(c_reg))) < c_reg.shape[1]:
        raise MergeError(
            f"The regularization captions span only {rank} of {c_reg.shape[1]} dimensions of the "
            "text features; the problem then has no unique solution. Give more, and more varied, "
            "captions."
        )
    d = torch.linalg.solve(gram, c.T).T
    inner = d @ c.T
    if (rank := int(torch.linalg.matrix_rank(inner, hermitian=True))) < len(c):
        raise MergeError(
            f"Only {rank} of {len(c)} constraint rows are independent, so they cannot all be met "
            "exactly. Remove duplicate rows, or give every concept its own trigger word."
        )
    v_transposed: Tensor = torch.linalg.solve(inner.T, v - c @ w0.T).T
    merged: Tensor = w0 + v_transposed @ d
    return merged.to(weight.dtype)


def _check_shapes(
    weight: Tensor, regularization: Tensor, constraints: Tensor, targets: Tensor
) -> None:
    s, (o, d) = len(constraints), weight.shape if weight.ndim == 2 else (-1, -1)
    if regularization.shape[1:] != (d,) or constraints.shape != (s, d) or targets.shape != (s, o):
        raise MergeError(
            f"Shapes do not fit: weight {tuple(weight.shape)}, regularization "
            f"{tuple(regularization.shape)}, constraints {tuple(constraints.shape)}, targets "
            f"{tuple(targets.shape)}; needed (o, d), (n, d), (s, d), (s, o)."
        )
