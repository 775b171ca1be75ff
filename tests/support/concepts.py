"""Concepts with random weights, and plain numpy solutions to hold the merge against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from custom_diffusion.concept.concept import Concept, ModifierToken
from custom_diffusion.concept.delta import Delta, DenseDelta, LowRankDelta
from custom_diffusion.concept.layers import FAMILIES, Family
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]

KEY = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
VALUE = "input_blocks.1.1.transformer_blocks.0.attn2.to_v"
MIDDLE = "middle_block.1.transformer_blocks.0.attn2.to_v"
LAYERS = {KEY: 24, VALUE: 24, MIDDLE: 40}
"""Layer → output width: two widths, keys and values."""


def narrow_family(width: int = 64) -> Family:
    """Stable Diffusion 1.x, but for the width of its text features; quick to merge."""
    return replace(FAMILIES["sd15"], context_width=width, text_encoders={"clip_l": width})


def random_concept(
    token: str | None = "<new1>",
    class_noun: str = "cat",
    *,
    family: Family | None = None,
    rank: int | None = None,
    seed: int = 0,
    layers: Sequence[str] = tuple(LAYERS),
    size: float = 0.02,
    base_hash: str = "",
    constraint_prompts: tuple[str, ...] = (),
) -> Concept:
    """A concept with random deltas, dense or of the given rank, and a random token embedding."""
    family = family or narrow_family()
    draw = torch.Generator().manual_seed(seed)
    deltas = {
        layer: _random_delta(LAYERS[layer], family.context_width, rank, size, draw)
        for layer in layers
    }
    tokens = (
        (
            ModifierToken(
                token,
                class_noun,
                {
                    name: torch.randn(1, width, generator=draw)
                    for name, width in family.text_encoders.items()
                },
                initializer="ktn",
            ),
        )
        if token
        else ()
    )
    return Concept(
        family=family,
        deltas=deltas,
        tokens=tokens,
        base_hash=base_hash,
        constraint_prompts=constraint_prompts,
    )


def densified(concept: Concept) -> Concept:
    deltas = {layer: DenseDelta(delta.dense()) for layer, delta in concept.deltas.items()}
    return replace(concept, deltas=deltas)


def base_weights(width: int = 64, seed: int = 99) -> dict[str, Tensor]:
    """W₀ of every layer in LAYERS."""
    draw = torch.Generator().manual_seed(seed)
    return {
        layer: torch.randn(out, width, generator=draw) * width**-0.5
        for layer, out in LAYERS.items()
    }


def spectral_matrix(rows: int, columns: int, condition: float, seed: int = 0) -> Matrix:
    """A random matrix whose singular values fall from 1 to 1 / condition, evenly in logarithm."""
    draw = np.random.default_rng(seed)
    left, _ = np.linalg.qr(draw.standard_normal((rows, columns)))
    right, _ = np.linalg.qr(draw.standard_normal((columns, columns)))
    return left * np.geomspace(1.0, 1.0 / condition, columns) @ right.T


def solve_by_multipliers(weight: Matrix, c_reg: Matrix, c: Matrix, targets: Matrix) -> Matrix:
    """Eq. 4 as one linear system in the weights and the Lagrange multipliers."""
    width, constraints = weight.shape[1], len(c)
    gram = c_reg.T @ c_reg
    system = np.block([[gram, c.T], [c, np.zeros((constraints, constraints))]])
    right = np.concatenate([gram @ weight.T, targets])
    return np.linalg.solve(system, right)[:width].T


def solve_by_elimination(weight: Matrix, c_reg: Matrix, c: Matrix, targets: Matrix) -> Matrix:
    """Eq. 4 without squaring any condition: shortest step in the coordinates of C_reg's factor."""
    upper = np.linalg.qr(c_reg, mode="r")
    z = np.linalg.solve(upper.T, c.T).T
    step = np.linalg.lstsq(z, targets - c @ weight.T, rcond=None)[0]
    return weight + np.linalg.solve(upper, step).T


def objective(weight: Matrix, base: Matrix, c_reg: Matrix) -> float:
    return float(np.square(c_reg @ (weight - base).T).sum())


def _random_delta(
    out: int, width: int, rank: int | None, size: float, draw: torch.Generator
) -> Delta:
    if rank is None:
        return DenseDelta(size * torch.randn(out, width, generator=draw))
    up = size * torch.randn(out, rank, generator=draw)
    return LowRankDelta(up, torch.randn(rank, width, generator=draw) * rank**-0.5)
