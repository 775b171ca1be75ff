"""Rows that a merge must meet, and rows that must stay, against the whole objective written down as
one linear system in the change and the multipliers of the rows.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from custom_diffusion.merge.projector import CaptionFactor, caption_factor, constraint_projector
from support.concepts import Matrix, spectral_matrix


def constrained_change(c_reg: Matrix, c: Matrix, asked: Matrix) -> Matrix:
    """min over D of ‖D C_regᵀ‖² subject to D c_i = v_i; the ridge is among the rows of `c_reg`."""
    zeros = np.zeros((len(c), len(c)))
    system = np.block([[c_reg.T @ c_reg, c.T], [c, zeros]])
    right = np.concatenate([np.zeros((c.shape[1], asked.shape[1])), asked])
    return np.linalg.solve(system, right)[: c.shape[1]].T


class TestProjector:
    WIDTH, RIDGE = 24, 1e-3
    C_REG = spectral_matrix(200, WIDTH, 10.0)
    C = np.random.default_rng(1).standard_normal((5, WIDTH))
    ASKED = np.random.default_rng(2).standard_normal((5, 4))

    def factor(self) -> CaptionFactor:
        return caption_factor(torch.from_numpy(self.C_REG), 40, self.RIDGE)

    def ridged(self) -> Matrix:
        ridge = self.RIDGE * np.square(self.C_REG).sum() / self.WIDTH
        return np.concatenate([self.C_REG, math.sqrt(ridge) * np.eye(self.WIDTH)])

    def test_it_is_the_optimum_of_the_objective(self) -> None:
        projector = constraint_projector(self.factor(), torch.from_numpy(self.C))
        assert not projector.damped
        expected = constrained_change(self.ridged(), self.C, self.ASKED)
        ours = self.ASKED.T @ projector.dense().numpy()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
        met = projector.dense() @ torch.from_numpy(self.C).T
        torch.testing.assert_close(met, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-10)

    @pytest.mark.parametrize("staying", [(4,), (0, 2), (0, 1, 2, 3)])
    def test_rows_that_stay_shape_the_optimum_and_add_no_rank(
        self, staying: tuple[int, ...]
    ) -> None:
        still = torch.zeros(5, dtype=torch.bool)
        still[list(staying)] = True
        wanted = np.where(still.numpy()[:, None], 0.0, self.ASKED)
        projector = constraint_projector(self.factor(), torch.from_numpy(self.C), still=still)
        assert projector.left.shape == (5 - len(staying), 5 - len(staying))
        expected = constrained_change(self.ridged(), self.C, wanted)
        ours = self.ASKED[~still.numpy()].T @ projector.dense().numpy()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
