"""Rows of a merge that need not be met exactly: what follows a prompt's end, and the empty prompt.

The oracle writes the whole objective down as one linear system in the change and the multipliers of
the rows that must be met.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.merge.merging import (
    DEFAULT_NULL_WEIGHT,
    DEFAULT_PADDING_WEIGHT,
    merge_concepts,
)
from custom_diffusion.merge.projector import CaptionFactor, caption_factor, constraint_projector
from custom_diffusion.merge.rows import constraint_features
from support.concepts import LAYERS, Matrix, spectral_matrix
from support.merging import (
    CAPTIONS,
    CAT,
    DOG,
    RIDGE,
    VASE,
    WIDTH,
    caption_rows,
    change_of,
    constrained_features,
    distance,
    knowing,
    merge,
    null_features,
    padding_features,
    prompts_of,
)
from support.text import RecurrentTextEncoder
from torch import Tensor

HARD = math.inf
PAIR = [CAT, DOG]


def softly_constrained_change(
    c_reg: Matrix, c: Matrix, asked: Matrix, weights: Sequence[float]
) -> Matrix:
    """min over D of ‖D C_regᵀ‖² + Σ ω_i ‖D c_i − v_i‖²  subject to  D c_i = v_i where ω_i is HARD.

    The ridge is among the rows of `c_reg`.
    """
    omega = np.asarray(weights)
    hard, soft = np.isinf(omega), np.isfinite(omega)
    weighted = omega[soft, None] * c[soft]
    gram = c_reg.T @ c_reg + weighted.T @ c[soft]
    multipliers = np.zeros((int(hard.sum()), int(hard.sum())))
    system = np.block([[gram, c[hard].T], [c[hard], multipliers]])
    right = np.concatenate([weighted.T @ asked[soft], asked[hard]])
    return np.linalg.solve(system, right)[: c.shape[1]].T


def slack_of(weights: Sequence[float]) -> Tensor:
    return 1 / torch.tensor(weights, dtype=torch.float64)


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

    @pytest.mark.parametrize(
        "weights",
        [
            (HARD, HARD, HARD, 1e-2, 1e-2),
            (HARD, 0.5, HARD, 3.0, 1e-4),
            (40.0, 1e4, HARD, HARD, 1e-3),
            (1e-3, 1e-2, 0.1, 1.0, 10.0),
            (HARD,) * 5,
        ],
        ids=str,
    )
    def test_it_is_the_optimum_of_the_objective_with_hard_and_soft_rows(
        self, weights: tuple[float, ...]
    ) -> None:
        constraints = torch.from_numpy(self.C)
        projector = constraint_projector(self.factor(), constraints, slack_of(weights))
        assert not projector.damped
        expected = softly_constrained_change(self.ridged(), self.C, self.ASKED, weights)
        ours = self.ASKED.T @ projector.dense().numpy()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-9 * np.abs(expected).max())

    @pytest.mark.parametrize("staying", [(4,), (0, 2), (0, 1, 2, 3)])
    def test_rows_that_stay_shape_the_optimum_and_add_no_rank(
        self, staying: tuple[int, ...]
    ) -> None:
        still = torch.zeros(5, dtype=torch.bool)
        still[list(staying)] = True
        wanted = np.where(still.numpy()[:, None], 0.0, self.ASKED)
        projector = constraint_projector(self.factor(), torch.from_numpy(self.C), still=still)
        assert projector.left.shape == (5 - len(staying), 5 - len(staying))
        expected = softly_constrained_change(self.ridged(), self.C, wanted, (HARD,) * 5)
        ours = self.ASKED[~still.numpy()].T @ projector.dense().numpy()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 * np.abs(expected).max())

    def test_no_slack_is_slack_zero(self) -> None:
        constraints = torch.from_numpy(self.C)
        plain = constraint_projector(self.factor(), constraints)
        slack = constraint_projector(self.factor(), constraints, torch.zeros(5))
        assert slack.condition == pytest.approx(plain.condition)
        assert slack.damped is plain.damped is False
        # Without slack the rows are rounded to float32 and still met exactly.
        assert distance(slack.dense(), plain.dense()) < 1e-6

    @pytest.mark.parametrize("slack", [1e4, 5e4, 1e9])
    def test_much_slack_is_the_row_left_out(self, slack: float) -> None:
        constraints = torch.from_numpy(self.C)
        without = constraint_projector(self.factor(), constraints[:3])
        loose = torch.tensor([0.0, 0.0, 0.0, slack, slack])
        projector = constraint_projector(self.factor(), constraints, loose)
        p = projector.dense()
        assert not projector.damped
        assert distance(p[:3], without.dense()) < 300 / slack
        assert float((p[3:] @ constraints.T).abs().max()) < 300 / slack

    def test_more_slack_meets_a_row_less(self) -> None:
        constraints = torch.from_numpy(self.C)
        met = [
            float(
                constraint_projector(
                    self.factor(), constraints, torch.tensor([0, 0, 0, 0, slack])
                ).dense()[4]
                @ constraints[4]
            )
            for slack in (0.0, 1.0, 1e2, 1e3, 1e4)
        ]
        assert met == sorted(met, reverse=True)
        assert met[0] == pytest.approx(1.0)

    def test_hard_rows_are_met_beside_soft_ones(self) -> None:
        constraints = torch.from_numpy(self.C)
        slack = torch.tensor([0.0, 0.0, 0.0, 5.0, 50.0])
        p = constraint_projector(self.factor(), constraints, slack).dense()
        wanted = torch.eye(5, 3, dtype=torch.float64)
        torch.testing.assert_close(p @ constraints[:3].T, wanted, rtol=0, atol=1e-10)


class TestCaptionFactor:
    FEATURES = torch.from_numpy(spectral_matrix(200, WIDTH, 10.0))
    ROWS = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.manual_seed(0))

    @pytest.mark.parametrize("ridge", [0.0, 1e-8, 1e-3])
    @pytest.mark.parametrize("weight", [1e-4, 1.0, 300.0])
    def test_more_rows_are_as_if_they_had_been_among_the_captions(
        self, ridge: float, weight: float
    ) -> None:
        captions = 40
        ours = caption_factor(self.FEATURES, captions, ridge).with_rows(self.ROWS, weight)
        together = torch.cat([self.FEATURES, math.sqrt(weight * captions) * self.ROWS])
        # The ridge stays that of the captions alone; a relative one refers to all features.
        same = ridge * float(self.FEATURES.square().sum() / together.square().sum())
        expected = caption_factor(together, captions, same)
        assert ours.captions == captions
        assert ours.upper.dtype == torch.float64
        assert torch.equal(ours.upper, ours.upper.triu())
        torch.testing.assert_close(
            ours.upper.T @ ours.upper, expected.upper.T @ expected.upper, rtol=1e-9, atol=1e-10
        )

    def test_the_factor_itself_stays_as_it_was(self) -> None:
        factor = caption_factor(self.FEATURES, 40, 1e-4)
        before = factor.upper.clone()
        factor.with_rows(self.ROWS.float(), 1.0)
        assert torch.equal(factor.upper, before)


class TestRows:
    def test_a_prompt_has_a_soft_row_for_its_padding(self) -> None:
        encoder = knowing(PAIR)
        rows, features = constraint_features(PAIR, encoder, padding=True)
        hard_rows, hard_features = constraint_features(PAIR, encoder)
        soft = [row.soft for row in rows]
        assert [row for row in rows if not row.soft] == hard_rows
        assert torch.equal(features[[not s for s in soft]], hard_features)
        assert [(row.concept, row.prompt) for row in rows if row.soft] == [
            (index, prompt) for index, concept in enumerate(PAIR) for prompt in prompts_of(concept)
        ]
        expected = torch.cat([padding_features(concept, encoder) for concept in PAIR])
        torch.testing.assert_close(features[soft], expected, rtol=1e-5, atol=1e-5)

    def test_a_prompt_that_fills_the_encoder_has_no_padding_to_keep(self) -> None:
        full = "word " * 73 + "<new1> cat"
        concept = replace(CAT, constraint_prompts=(full, f"a {full[5:]}", full[5:]))
        rows, _ = constraint_features([concept], knowing([CAT]), padding=True)
        assert [(row.prompt, row.position) for row in rows if row.soft] == [(full[5:], 76)]


def keys_and_values(concept: Concept, words: Tensor) -> Tensor:
    """What a concept adds to the projections of words, of all layers side by side."""
    return torch.cat([words @ change_of(concept, layer).T for layer in LAYERS], dim=1)


def padding_error(merged: Concept, concepts: Sequence[Concept]) -> float:
    """How far the padding of the concepts' prompts is from what they ask for."""
    words = [padding_features(concept, knowing(concepts)) for concept in concepts]
    asked = [keys_and_values(concept, w) for concept, w in zip(concepts, words, strict=True)]
    return distance(keys_and_values(merged, torch.cat(words)), torch.cat(asked))


class TestMerge:
    @pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.5, 2.0)], ids=str)
    def test_every_layer_is_the_optimum_with_padding_and_empty_prompt(
        self, strengths: tuple[float, float]
    ) -> None:
        padding_weight, null_weight = 0.5, 0.2
        merged, report = merge(
            PAIR, strengths, padding_weight=padding_weight, null_weight=null_weight
        )
        assert not report.damped
        nothing = math.sqrt(null_weight * len(CAPTIONS)) * null_features()
        c_reg = torch.cat([caption_rows(), nothing]).numpy()
        hard = [constrained_features(concept, knowing(PAIR)) for concept in PAIR]
        soft = [padding_features(concept, knowing(PAIR)) for concept in PAIR]
        weights = [HARD] * 12 + [padding_weight * len(CAPTIONS)] * 4
        for layer in LAYERS:
            asked = [
                strength * words @ change_of(concept, layer).T
                for kind in (hard, soft)
                for concept, words, strength in zip(PAIR, kind, strengths, strict=True)
            ]
            expected = softly_constrained_change(
                c_reg, torch.cat([*hard, *soft]).numpy(), torch.cat(asked).numpy(), weights
            )
            assert distance(change_of(merged, layer), torch.from_numpy(expected)) < 1e-5

    @pytest.mark.parametrize("weight", [0.1, 1.0, 10.0])
    def test_padding_comes_nearer_to_what_the_concepts_ask_for(self, weight: float) -> None:
        """And their own words stay where they ask for them."""
        merged, report = merge(PAIR, padding_weight=weight)
        assert max(report.residuals) < 1e-4
        for concept in PAIR:
            words = constrained_features(concept, knowing(PAIR))
            own = keys_and_values(concept, words)
            assert distance(keys_and_values(merged, words), own) < 1e-4
        assert padding_error(merged, PAIR) < 0.9 * padding_error(merge(PAIR)[0], PAIR)

    @pytest.mark.parametrize(("concepts", "last"), [([CAT], 0.02), (PAIR, 0.7)], ids=["one", "two"])
    def test_a_larger_weight_brings_padding_nearer(
        self, concepts: list[Concept], last: float
    ) -> None:
        """Two concepts ask for different things of padding that reads nearly alike."""
        weights = (0.0, 0.01, 0.1, 1.0, 10.0)
        errors = [
            padding_error(merge(concepts, padding_weight=weight)[0], concepts) for weight in weights
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < last < errors[0]

    @pytest.mark.parametrize("weight", [0.01, 1e-4])
    def test_a_small_padding_weight_is_next_to_none(self, weight: float) -> None:
        none, _ = merge(PAIR)
        merged, report = merge(PAIR, padding_weight=weight)
        assert max(report.residuals) < 1e-4
        for layer in LAYERS:
            assert distance(change_of(merged, layer), change_of(none, layer)) < 20 * weight

    def test_the_empty_prompt_stays_as_it_is_with_a_large_weight(self) -> None:
        free, _ = merge(PAIR)
        held, report = merge(PAIR, null_weight=1e6)
        moved = float(keys_and_values(free, null_features()).norm())
        assert float(keys_and_values(held, null_features()).norm()) < 1e-3 * moved
        assert max(report.residuals) < 1e-4
        assert len(report.rows) == 12

    def test_both_at_once_do_what_each_does(self) -> None:
        free, _ = merge(PAIR)
        merged, report = merge(PAIR, padding_weight=1.0, null_weight=1.0)
        assert max(report.residuals) < 1e-4
        assert padding_error(merged, PAIR) < padding_error(free, PAIR)
        moved, still = (keys_and_values(c, null_features()).norm() for c in (free, merged))
        assert still < moved

    def test_the_order_of_the_concepts_does_not_matter(self) -> None:
        weights = {"padding_weight": 1.0, "null_weight": 1.0}
        merged, _ = merge([CAT, DOG, VASE], [1.0, 0.5, 2.0], **weights)
        other, _ = merge([VASE, CAT, DOG], [2.0, 1.0, 0.5], **weights)
        for layer in LAYERS:
            assert distance(change_of(other, layer), change_of(merged, layer)) < 1e-5

    def test_weights_of_zero_leave_both_out(self) -> None:
        def refuse(*_: object) -> CaptionFactor:
            raise AssertionError("no row may be added")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CaptionFactor, "with_rows", refuse)
            _, report = merge(PAIR, padding_weight=0.0, null_weight=0.0)
        assert len(report.rows) == 12
        assert not any(row.soft for row in report.rows)

    def test_weights_that_are_not_given_are_the_defaults(self) -> None:
        encoder = RecurrentTextEncoder(WIDTH)
        merged, report = merge_concepts(PAIR, encoder, captions=CAPTIONS, relative_ridge=RIDGE)
        expected, expected_report = merge(
            PAIR, padding_weight=DEFAULT_PADDING_WEIGHT, null_weight=DEFAULT_NULL_WEIGHT
        )
        assert report == expected_report
        for layer in LAYERS:
            assert torch.equal(change_of(merged, layer), change_of(expected, layer))
