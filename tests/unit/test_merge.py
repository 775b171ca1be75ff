"""Merging concepts: what Eq. 4-5 demands, layer by layer, and what happens where it cannot be met.

The text encoder is a small causal one; the oracle of every layer is the closed form for one matrix,
fed with features that this file gathers itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from custom_diffusion.concept.concept import Concept, ModifierToken
from custom_diffusion.concept.delta import DenseDelta, LowRankDelta
from custom_diffusion.concept.errors import (
    ConceptFileError,
    IncompatibleModelError,
    MergeError,
    TokenError,
)
from custom_diffusion.concept.file import read_concept, write_concept
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.concept.text import encode_unpadded
from custom_diffusion.merge.caption_cache import cached_caption_factor
from custom_diffusion.merge.closed_form import constrained_least_squares
from custom_diffusion.merge.merging import merge_concepts
from custom_diffusion.merge.projector import (
    EXACT_CONDITION_LIMIT,
    caption_factor,
    constraint_projector,
)
from custom_diffusion.merge.report import LARGE_CHANGE, LARGE_RESIDUAL
from custom_diffusion.merge.rows import SAME_ROW_DISTANCE
from safetensors.torch import load_file, save_file
from support.concepts import (
    KEY,
    LAYERS,
    MIDDLE,
    VALUE,
    base_weights,
    densified,
    narrow_family,
    objective,
    random_concept,
    solve_by_elimination,
    spectral_matrix,
)
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
)
from support.text import RecurrentTextEncoder
from torch import Tensor

SETS = {"one": [CAT], "two": [CAT, DOG], "three": [CAT, DOG, VASE]}


class TestEquation:
    @pytest.mark.parametrize("strengths", [None, [0.5, 1.0, 2.0]], ids=str)
    @pytest.mark.parametrize("names", SETS)
    def test_every_layer_is_the_closed_form(
        self, names: str, strengths: list[float] | None
    ) -> None:
        """As large as training makes them: some 2 % of the base model's weights."""
        concepts = [scaled(concept, 0.125) for concept in SETS[names]]
        strengths = strengths and strengths[: len(concepts)]
        merged, report = merge(concepts, strengths)
        assert not report.damped
        features = [constrained_features(c, knowing(concepts)) for c in concepts]
        constraints, c_reg = torch.cat(features), caption_rows()
        assert set(merged.deltas) == set(LAYERS)
        for layer, base in base_weights(WIDTH).items():
            base = base.double()
            targets = [
                c @ (base + a * change_of(concept, layer)).T
                for concept, c, a in zip(concepts, features, strengths or [1.0] * 3, strict=False)
            ]
            expected = constrained_least_squares(base, c_reg, constraints, torch.cat(targets))
            ours = base + change_of(merged, layer)
            assert distance(ours, expected) < 1e-6
            assert distance(change_of(merged, layer), expected - base) < 1e-5

    @pytest.mark.parametrize("names", SETS)
    def test_every_concepts_words_map_as_in_its_own_model(self, names: str) -> None:
        concepts = SETS[names]
        merged, report = merge(concepts)
        for concept in concepts:
            words = constrained_features(concept, knowing(concepts)).float()
            for layer, base in base_weights(WIDTH).items():
                own = (base + change_of(concept, layer).float()) @ words.T
                ours = (base + change_of(merged, layer).float()) @ words.T
                assert distance(ours, own) < 1e-4
        assert max(report.residuals) < 1e-4

    def test_one_concept_alone_maps_its_words_as_before(self) -> None:
        merged, _ = merge([CAT])
        words = constrained_features(CAT, knowing([CAT])).float()
        for layer, delta in CAT.deltas.items():
            assert distance(merged.deltas[layer].map_rows(words), delta.map_rows(words)) < 1e-5

    @pytest.mark.parametrize("strengths", [(0.0, 1.0), (0.5, 1.0), (0.0, 0.0), (-1.0, 0.3)])
    def test_strengths_scale_what_each_concept_asks_for(
        self, strengths: tuple[float, float]
    ) -> None:
        concepts = [CAT, DOG]
        merged, report = merge(concepts, strengths)
        for concept, strength in zip(concepts, strengths, strict=True):
            words = constrained_features(concept, knowing(concepts)).float()
            for layer, delta in concept.deltas.items():
                asked = delta.map_rows(words)
                error = merged.deltas[layer].map_rows(words) - strength * asked
                assert float(error.norm() / asked.norm()) < 1e-4
        assert all(residual < 1e-4 for residual in report.residuals), report.residuals

    def test_strength_zero_keeps_the_base_models_words(self) -> None:
        """A concept at strength 0 still holds its words: they are kept as the base maps them."""
        merged, report = merge([CAT, DOG], [0.0, 0.0])
        assert all(not change_of(merged, layer).any() for layer in LAYERS)
        assert report.residuals == (0.0, 0.0)
        assert report.change == 0.0

    def test_a_residual_is_relative_to_what_the_concept_asks_for(self) -> None:
        """Two meanings for one word: each misses by half the difference of the two."""
        cat = random_concept(None, seed=1, constraint_prompts=("cat",))
        other = random_concept(None, seed=2, constraint_prompts=("cat",))
        _, report = merge([cat, other])
        encoder = RecurrentTextEncoder(WIDTH)
        words = encoder.encode(torch.tensor([encoder.tokenize("cat")]))[0, 1:].double()
        asked = [
            torch.cat([words @ change_of(c, layer).T for layer in LAYERS], dim=1)
            for c in (cat, other)
        ]
        half = (asked[0] - asked[1]).norm(dim=1) / 2
        expected = [float((half / a.norm(dim=1)).max()) for a in asked]
        assert report.residuals == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("names", SETS)
    def test_the_result_is_low_rank_and_its_factors_are_shared(self, names: str) -> None:
        merged, report = merge(SETS[names])
        rows = 6 * len(SETS[names])  # two prompts of: token, class noun, end of text
        assert len(report.rows) == report.shared_rows == rows
        for layer in LAYERS:
            delta = merged.deltas[layer]
            assert isinstance(delta, LowRankDelta)
            assert delta.rank <= rows
            assert int(torch.linalg.matrix_rank(delta.dense(), rtol=1e-5)) <= rows
        downs = [d.down for d in merged.deltas.values() if isinstance(d, LowRankDelta)]
        assert len({down.data_ptr() for down in downs}) == 1
        torch.testing.assert_close(downs[0] @ downs[0].T, torch.eye(rows), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("strengths", [(1.0, 1.0, 1.0), (0.5, 1.0, 0.0)])
    def test_the_order_of_the_concepts_does_not_matter(
        self, strengths: tuple[float, float, float]
    ) -> None:
        concepts = [CAT, DOG, VASE]
        merged, report = merge(concepts, strengths)
        for order in ([1, 0, 2], [2, 1, 0], [1, 2, 0]):
            other, other_report = merge([concepts[i] for i in order], [strengths[i] for i in order])
            for layer in LAYERS:
                assert distance(change_of(other, layer), change_of(merged, layer)) < 1e-5
            assert other_report.change == pytest.approx(report.change, rel=1e-5)
            assert other_report.condition == pytest.approx(report.condition, rel=1e-6)

    def test_low_rank_concepts_merge_as_their_dense_forms(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        concepts = [
            random_concept("<new1>", "cat", rank=3, seed=1),
            random_concept("<new2>", "dog", rank=5, seed=2),
        ]
        expected, expected_report = merge([densified(concept) for concept in concepts])
        monkeypatch.setattr(LowRankDelta, "dense", _refuse)
        merged, report = merge(concepts)
        monkeypatch.undo()
        for layer in LAYERS:
            assert distance(change_of(merged, layer), change_of(expected, layer)) < 1e-5
        assert report.change == pytest.approx(expected_report.change, rel=1e-5)

    def test_half_precision_concepts_merge_in_single_precision(self) -> None:
        merged, _ = merge([CAT.to(torch.float16), DOG.to(torch.float16)])
        expected, _ = merge([CAT, DOG])
        for layer in LAYERS:
            delta = merged.deltas[layer]
            assert isinstance(delta, LowRankDelta)
            assert delta.up.dtype == delta.down.dtype == torch.float32
            assert distance(change_of(merged, layer), change_of(expected, layer)) < 0.02

    def test_concepts_may_change_different_layers(self) -> None:
        cat = random_concept("<new1>", "cat", seed=1, layers=(KEY, MIDDLE))
        dog = random_concept("<new2>", "dog", seed=2, layers=(KEY, VALUE))
        merged, report = merge([cat, dog])
        assert set(merged.deltas) == {KEY, VALUE, MIDDLE}
        whole = [_with_zeros(cat), _with_zeros(dog)]
        expected, _ = merge(whole)
        for layer in LAYERS:
            assert distance(change_of(merged, layer), change_of(expected, layer)) < 1e-6
        assert max(report.residuals) < 1e-4

    def test_on_other_words_the_model_changes_less_than_with_added_deltas(self) -> None:
        """What the least squares are for."""
        merged, _ = merge([CAT, DOG])
        c_reg = caption_rows()
        for layer in LAYERS:
            added = change_of(CAT, layer) + change_of(DOG, layer)
            ours = float((c_reg @ change_of(merged, layer).T).norm())
            assert ours < float((c_reg @ added.T).norm())

    def test_the_projector_maps_each_constraint_to_itself(self) -> None:
        c = constrained_features(CAT, knowing([CAT]))
        projector = constraint_projector(caption_factor(caption_rows(), 60, 0.0), c)
        assert not projector.damped
        one = torch.eye(len(c), dtype=torch.float64)
        torch.testing.assert_close(projector.dense() @ c.T, one, rtol=0, atol=1e-9)
        torch.testing.assert_close(projector.rows @ projector.rows.T, one, rtol=0, atol=1e-6)
        as_kept = projector.rows.float().double()  # what a merged concept holds
        torch.testing.assert_close(projector.left @ as_kept @ c.T, one, rtol=0, atol=1e-9)


class TestProjector:
    @pytest.mark.parametrize("condition", [1.0, 1e3, 3.5e4])
    def test_it_is_the_least_change_that_maps_each_constraint_to_itself(
        self, condition: float
    ) -> None:
        c_reg = torch.from_numpy(spectral_matrix(400, WIDTH, condition))
        mixing = torch.randn(6, 400, dtype=torch.float64, generator=torch.manual_seed(0))
        c = mixing @ c_reg
        projector = constraint_projector(caption_factor(c_reg, 40, 0.0), c)
        nothing, one = np.zeros((6, WIDTH)), np.eye(6)
        expected = solve_by_elimination(nothing, c_reg.numpy(), c.numpy(), one)
        assert not projector.damped
        p = projector.dense()
        torch.testing.assert_close(p @ c.T, torch.from_numpy(one), rtol=0, atol=1e-9)
        assert objective(p.numpy(), nothing, c_reg.numpy()) <= 1.000001 * objective(
            expected, nothing, c_reg.numpy()
        )
        # The rows are rounded to float32, as a merged concept keeps them.
        assert distance(p, torch.from_numpy(expected)) < 1e-7 + 1e-9 * condition

    def test_the_condition_is_that_of_the_whitened_constraints(self) -> None:
        c_reg = torch.from_numpy(spectral_matrix(400, WIDTH, 100.0))
        c = torch.randn(6, WIDTH, dtype=torch.float64, generator=torch.manual_seed(0))
        projector = constraint_projector(caption_factor(c_reg, 40, 0.0), c)
        inner = c @ torch.linalg.solve(c_reg.T @ c_reg, c.T)
        assert projector.condition == pytest.approx(float(torch.linalg.cond(inner)) ** 0.5)

    @pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-7, 1e-4, 1e-3, 1e-2])
    def test_rows_that_nearly_coincide_are_damped_and_bounded(self, gap: float) -> None:
        """Even where what they ask for is opposite."""
        c_reg = torch.from_numpy(spectral_matrix(400, WIDTH, 50.0))
        draw = torch.manual_seed(0)
        row, other = torch.randn(2, WIDTH, dtype=torch.float64, generator=draw)
        c = torch.stack([row, row + gap * row.norm() * other / other.norm()])
        projector = constraint_projector(caption_factor(c_reg, 40, 0.0), c)
        alone = constraint_projector(caption_factor(c_reg, 40, 0.0), row[None])
        opposite = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
        p = projector.dense()
        assert torch.isfinite(p).all()
        assert projector.damped is (projector.condition > EXACT_CONDITION_LIMIT)
        # max over s of s / (s² + μ) is 1 / (2 √μ): some sixteen times one row's own change
        assert float((opposite @ p @ c_reg.T).norm()) < 32 * float((alone.dense() @ c_reg.T).norm())
        if gap < 1e-3:
            assert projector.damped

    def test_what_equal_rows_both_ask_for_is_done(self) -> None:
        c_reg = torch.from_numpy(spectral_matrix(400, WIDTH, 50.0))
        row = torch.randn(1, WIDTH, dtype=torch.float64, generator=torch.manual_seed(0))
        projector = constraint_projector(caption_factor(c_reg, 40, 0.0), torch.cat([row, row]))
        mapped = torch.ones(1, 2, dtype=torch.float64) @ projector.dense() @ row.T
        assert float(mapped) == pytest.approx(1.0, abs=2e-3)

    def test_more_constraints_than_dimensions_stay_finite(self) -> None:
        c_reg = torch.from_numpy(spectral_matrix(100, 8, 5.0))
        c = torch.randn(12, 8, dtype=torch.float64, generator=torch.manual_seed(0))
        projector = constraint_projector(caption_factor(c_reg, 10, 0.0), c)
        assert projector.damped
        assert projector.condition == float("inf")
        assert projector.dense().shape == (12, 8)
        assert torch.isfinite(projector.dense()).all()

    @pytest.mark.parametrize("ridge", [0.0, 1e-8, 1e-4, 0.1])
    def test_the_caption_factor_is_a_root_of_the_ridged_gram_matrix(self, ridge: float) -> None:
        c_reg = torch.from_numpy(spectral_matrix(400, WIDTH, 10.0)).float()
        upper = caption_factor(c_reg, 40, ridge).upper
        gram = c_reg.double().T @ c_reg.double()
        gram += ridge * gram.trace() / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
        assert upper.dtype == torch.float64
        assert torch.equal(upper, upper.triu())
        torch.testing.assert_close(upper.T @ upper, gram, rtol=1e-10, atol=1e-12)

    def test_too_few_captions_without_a_ridge_are_refused(self) -> None:
        with pytest.raises(MergeError) as caught:
            caption_factor(torch.randn(10, WIDTH), 2, 0.0)
        message = str(caught.value)
        assert "2 regularization captions give 10 rows" in message
        assert f"at least {WIDTH}" in message
        assert "relative ridge above 0" in message

    def test_captions_that_do_not_span_the_features_are_refused_without_a_ridge(self) -> None:
        features = torch.randn(400, WIDTH, generator=torch.manual_seed(0), dtype=torch.float64)
        features[:, 7] = features[:, 3] + features[:, 4]
        with pytest.raises(MergeError, match="do not span all 64 dimensions"):
            caption_factor(features, 40, 0.0)
        assert torch.isfinite(caption_factor(features, 40, 1e-4).upper).all()


def scaled(concept: Concept, factor: float) -> Concept:
    deltas = {layer: delta.scaled(factor) for layer, delta in concept.deltas.items()}
    return replace(concept, deltas=deltas)


def _refuse(self: object) -> Tensor:
    raise AssertionError("the dense matrix was built")


def _with_zeros(concept: Concept) -> Concept:
    deltas = dict(concept.deltas)
    for layer, out in LAYERS.items():
        deltas.setdefault(layer, DenseDelta(torch.zeros(out, WIDTH)))
    return replace(concept, deltas=deltas)


def shifted_twin(gap: float) -> Concept:
    """Another meaning for nearly the same words as CAT's: a token with nearly the same embedding,
    opposite deltas.
    """
    (token,) = CAT.tokens
    embedding = token.embeddings["clip_l"]
    step = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(5))
    near = embedding + gap * embedding.norm() * step / step.norm()
    twin = ModifierToken("<twin>", "cat", {"clip_l": near})
    return replace(scaled(CAT, -1.0), tokens=(twin,))


class TestConflicts:
    @pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1])
    def test_near_duplicate_contradictory_words_stay_bounded_and_are_reported(
        self, gap: float
    ) -> None:
        concepts = [CAT, shifted_twin(gap)]
        merged, report = merge(concepts)
        rows, twins = (constrained_features(c, knowing(concepts)) for c in concepts)
        limit = SAME_ROW_DISTANCE * torch.maximum(rows.norm(dim=1), twins.norm(dim=1))
        equal = (rows - twins).norm(dim=1) < limit
        same = int(equal.sum())
        assert report.shared_rows == 12 - same
        prompts = {int(row) // 3 for row in equal.nonzero()}  # three rows a prompt
        assert len(report.conflicts) == len(prompts)
        assert all(torch.isfinite(change_of(merged, layer)).all() for layer in LAYERS)
        assert report.damped is (report.condition > EXACT_CONDITION_LIMIT)
        assert report.change < 32
        if gap <= 1e-4:
            assert same == 6
        if same == 6:
            assert report.change < 1e-2, "opposite demands on equal words cancel"

    @pytest.mark.parametrize("gap", [1e-2, 3e-2])
    def test_without_damping_they_would_blow_up(self, gap: float) -> None:
        """The formula of the paper on the same rows, for comparison."""
        concepts = [CAT, shifted_twin(gap)]
        merged, report = merge(concepts)
        assert report.damped
        features = [constrained_features(c, knowing(concepts)) for c in concepts]
        targets = [c @ change_of(o, KEY).T for c, o in zip(features, concepts, strict=True)]
        exact = constrained_least_squares(
            torch.zeros(LAYERS[KEY], WIDTH, dtype=torch.float64),
            caption_rows(),
            torch.cat(features),
            torch.cat(targets),
        )
        assert float(exact.norm()) > 3 * float(change_of(merged, KEY).norm())

    def test_a_conflict_names_both_concepts_and_the_words(self) -> None:
        concepts = [
            random_concept(None, seed=seed, constraint_prompts=("photo of a cat",))
            for seed in (1, 2)
        ]
        _, report = merge(concepts)
        (conflict,) = report.conflicts  # once, though the end of text conflicts as 'cat' does
        assert "concept 1 in 'photo of a cat'" in conflict
        assert "concept 2 in 'photo of a cat'" in conflict
        assert "Give each concept its own trigger word" in conflict
        assert f"conflict: {conflict}" in report.text()

    def test_words_that_are_one_to_the_text_encoder_are_told_of(self) -> None:
        """Half precision has rounded one of them; another name for the same concept is no fault."""
        (word,) = CAT.tokens
        rounded = {k: rows.half().float() for k, rows in word.embeddings.items()}
        other = replace(
            random_concept(None, seed=7),
            tokens=(replace(word, name="<other>", embeddings=rounded),),
        )
        _, report = merge([CAT, other])
        assert f"{word.name} and <other> are the same to the text encoder" in report.text()
        _, report = merge([CAT, CAT.with_token("<other>")])
        assert "are the same to the text encoder" not in report.text()
        _, report = merge([CAT, DOG])
        assert "are the same to the text encoder" not in report.text()

    def test_one_concept_under_two_names_agrees_with_itself(self) -> None:
        twin = replace(CAT, tokens=(replace(CAT.tokens[0], name="<twin>"),), constraint_prompts=())
        _, report = merge([replace(CAT, constraint_prompts=()), twin])
        assert report.shared_rows < len(report.rows), "their words are the same"
        assert max(report.residuals) < 1e-3
        assert report.conflicts == () and not list(report.warnings())
        _, report = merge([replace(CAT, constraint_prompts=()), twin], (1.0, 0.5))
        assert report.conflicts, "at two strengths it asks for two things"

    @pytest.mark.parametrize("strengths", [(1.0, 1.0), (1.0, 3.0), (1.0, 0.0), (0.5, 0.5)])
    def test_equal_words_map_to_the_weighted_mean_of_what_is_asked(
        self, strengths: tuple[float, float]
    ) -> None:
        concepts = [random_concept(None, seed=seed, constraint_prompts=("cat",)) for seed in (1, 2)]
        merged, _ = merge(concepts, strengths)
        encoder = RecurrentTextEncoder(WIDTH)
        words = encoder.encode(torch.tensor([encoder.tokenize("cat")]))[0, 1:].double()
        a, b = strengths
        for layer in LAYERS:
            x, y = (words @ change_of(concept, layer).T for concept in concepts)
            mean = (a * (a * x) + b * (b * y)) / (a + b)
            assert distance(words @ change_of(merged, layer).T, mean) < 1e-4

    def test_a_prompt_given_twice_is_no_conflict(self) -> None:
        once = replace(CAT, constraint_prompts=("<new1> cat",))
        twice = replace(CAT, constraint_prompts=("<new1> cat", "<new1> cat"))
        merged, report = merge([twice, DOG])
        expected, _ = merge([once, DOG])
        assert report.conflicts == ()
        assert len(report.rows) == 12
        assert report.shared_rows == 9
        for layer in LAYERS:
            assert distance(change_of(merged, layer), change_of(expected, layer)) < 1e-5

    def test_the_words_before_the_token_are_free(self) -> None:
        """'photo of a' is the same for both concepts and must not be a conflict."""
        _, report = merge([CAT, DOG])
        assert report.conflicts == ()
        for row in report.rows:
            token = [CAT, DOG][row.concept].tokens[0].name
            encoder = knowing([CAT, DOG])
            ids = encoder.tokenize(row.prompt)
            assert row.position >= ids.index(encoder.tokenize_words(token)[0])

    @pytest.mark.parametrize("reverse", [False, True])
    def test_a_prompt_with_two_tokens_is_constrained_from_the_first(self, reverse: bool) -> None:
        """Whichever of the two the concept lists first."""
        tokens = (*CAT.tokens, *DOG.tokens)
        prompt = "<new1> cat and <new2> dog"
        both = replace(
            CAT,
            tokens=tuple(reversed(tokens)) if reverse else tokens,
            constraint_prompts=(prompt,),
        )
        _, report = merge([both])
        assert [row.position for row in report.rows] == [1, 2, 3, 4, 5, 6]


class TestReport:
    def test_it_says_what_was_done(self) -> None:
        merged, report = merge([CAT, DOG])
        text = report.text()
        assert text.splitlines() == list(report.lines())
        verdict, details = text.split("\n\ndetails\n")
        assert verdict == "Both concepts keep their look. Nothing else changed."
        assert report.verdict() == verdict
        assert (
            f"12 constraint rows, 12 different; exact (condition {report.condition:.3g})" in details
        )
        assert "60 regularization captions" in details
        assert "concept 1: largest error on its own words 0.00%" in details
        assert "concept 2: largest error on its own words 0.00%" in details
        norms = [
            sum(float(change_of(c, layer).square().sum()) for layer in LAYERS) ** 0.5
            for c in (merged, CAT, DOG)
        ]
        assert report.change == pytest.approx(norms[0] / max(norms[1:]), rel=1e-5)

    @pytest.mark.parametrize(
        ("residuals", "change", "verdict"),
        [
            ((0.0,), 1, "The concept keeps its look. Nothing else changed."),
            ((0.0, 0.05), 1, "Both concepts keep their look, nearly. Nothing else changed."),
            ((0.0,) * 3, 1, "All 3 concepts keep their look. Nothing else changed."),
            ((0.0, 0.2), 1, "Concept 2 lost some of its look. Nothing else changed."),
            (
                (0.2, 0.3),
                6,
                "Concept 1 and concept 2 lost some of their look. The rest of the model changed a "
                "lot.",
            ),
        ],
    )
    def test_the_verdict_comes_first_and_has_no_technical_word(
        self, residuals: tuple[float, ...], change: float, verdict: str
    ) -> None:
        report = replace(merge([CAT, DOG])[1], residuals=residuals, change=change, damped=True)
        assert next(report.lines()) == report.summary()[0] == verdict
        before, _ = report.text().split("\ndetails\n")
        for word in ("exact", "damped", "condition", "constraint"):
            assert word not in before
            assert word not in "".join(report.warnings())

    def test_a_large_change_is_a_warning(self) -> None:
        _, report = merge([CAT, shifted_twin(0.1)])
        assert report.change > LARGE_CHANGE
        assert "warning" in report.text()
        assert "train the concepts together" in report.text()
        assert "train the concepts" not in merge([CAT, DOG])[1].text()

    @pytest.mark.parametrize(
        ("change", "residual", "warnings"),
        [
            (LARGE_CHANGE, LARGE_RESIDUAL, 0),
            (1.01 * LARGE_CHANGE, LARGE_RESIDUAL, 1),
            (LARGE_CHANGE, 1.01 * LARGE_RESIDUAL, 1),
        ],
    )
    def test_only_what_is_too_large_is_a_warning(
        self, change: float, residual: float, warnings: int
    ) -> None:
        report = replace(merge([CAT, DOG])[1], change=change, residuals=(0.0, residual))
        assert report.text().count("warning") == warnings

    def test_errors_are_percentages_that_can_be_read(self) -> None:
        """Also for a concept at strength 0, and for one that learnt nothing."""
        for concepts, strengths in (([CAT, DOG], [1, 0]), ([CAT, scaled(DOG, 0.0)], [1, 1])):
            _, report = merge(concepts, strengths)
            assert max(report.residuals) < 1e-4, report.text()

    def test_progress_rises_to_one(self) -> None:
        seen: list[float] = []
        merge_concepts(
            [CAT, DOG], RecurrentTextEncoder(WIDTH), captions=CAPTIONS, on_progress=seen.append
        )
        assert seen == sorted(seen)
        assert seen[-1] == 1.0
        assert len(seen) > 1


class TestResult:
    def test_it_is_a_concept_with_every_token_and_prompt(self) -> None:
        cat = replace(CAT, base_hash="abc", provenance={"steps": 5})
        merged, _ = merge([cat, DOG], [1.0, 0.5])
        assert merged.tokens == (*CAT.tokens, *DOG.tokens)
        assert merged.family == CAT.family
        assert merged.base_hash == "abc"
        assert merged.constraint_prompts == (
            "<new1> cat",
            "photo of a <new1> cat",
            "<new2> dog",
            "photo of a <new2> dog",
        )
        assert merged.provenance["strengths"] == [1.0, 0.5]
        assert merged.provenance["parents"] == [{"steps": 5}, {}]

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_the_base_is_known_when_one_parent_knows_it(self, order: tuple[int, int]) -> None:
        concepts = [replace(CAT, base_hash="abc"), DOG]
        merged, _ = merge([concepts[i] for i in order])
        assert merged.base_hash == "abc"

    def test_it_can_be_written_and_still_maps_its_words(self, tmp_path: Path) -> None:
        family = FAMILIES["sd15"]
        cat = random_concept("<new1>", "cat", family=family, seed=1, layers=(KEY, VALUE))
        dog = random_concept("<new2>", "dog", family=family, seed=2, layers=(KEY, VALUE))
        encoder = RecurrentTextEncoder(768)
        merged, report = merge_concepts([cat, dog], encoder, captions=CAPTIONS)
        read = read_concept(write_concept(merged, tmp_path / "merged.safetensors"))
        knows = encoder.with_tokens(merged.embeddings())
        ids = knows.tokenize("photo of a <new2> dog")
        words = knows.encode(torch.tensor([ids]))[0, 4:]
        for layer in (KEY, VALUE):
            error = distance(read.deltas[layer].map_rows(words), dog.deltas[layer].map_rows(words))
            assert error < max(0.005, 2 * max(report.residuals))

    def test_a_merged_concept_can_be_merged_again(self) -> None:
        pair, _ = merge([CAT, DOG])
        merged, report = merge([pair, VASE])
        assert [t.name for t in merged.tokens] == ["<new1>", "<new2>", "<new3>"]
        assert len(report.rows) == 18
        for concept in (CAT, DOG, VASE):
            words = constrained_features(concept, knowing([merged])).float()
            for layer, delta in concept.deltas.items():
                assert distance(merged.deltas[layer].map_rows(words), delta.map_rows(words)) < 1e-4

    def test_the_inputs_are_not_changed(self) -> None:
        weights = {layer: delta.dense().clone() for layer, delta in CAT.deltas.items()}
        embedding = CAT.tokens[0].embeddings["clip_l"].clone()
        encoder = RecurrentTextEncoder(WIDTH)
        fingerprint = encoder.fingerprint()
        merge([CAT, DOG], [0.5, 2.0], encoder=encoder)
        assert all(torch.equal(CAT.deltas[layer].dense(), w) for layer, w in weights.items())
        assert torch.equal(CAT.tokens[0].embeddings["clip_l"], embedding)
        assert encoder.fingerprint() == fingerprint

    def test_the_same_merge_twice_is_bit_for_bit_the_same(self) -> None:
        first, second = (merge([CAT, DOG])[0] for _ in range(2))
        for layer in LAYERS:
            for name, tensor in first.deltas[layer].tensors().items():
                assert torch.equal(tensor, second.deltas[layer].tensors()[name])


class TestRefusals:
    def test_two_concepts_with_one_token(self) -> None:
        with pytest.raises(TokenError) as caught:
            merge([CAT, replace(DOG, tokens=(replace(DOG.tokens[0], name="<new1>"),))])
        message = str(caught.value)
        assert "<new1>" in message
        assert "Rename one of them" in message
        assert "Load Concept" in message

    def test_a_renamed_concept_can_be_merged(self) -> None:
        merged, report = merge([CAT, DOG.with_token("<new1>").with_token("<rex>")])
        assert [t.name for t in merged.tokens] == ["<new1>", "<rex>"]
        assert report.conflicts == ()

    def test_different_families(self) -> None:
        xl = random_concept("<new2>", "dog", family=FAMILIES["sdxl"])
        with pytest.raises(IncompatibleModelError) as caught:
            merge([CAT, xl])
        message = str(caught.value)
        assert "<new1> cat (Stable Diffusion 1.x" in message
        assert "<new2> dog (Stable Diffusion XL" in message
        assert "same base model" in message

    def test_different_base_checkpoints(self) -> None:
        concepts = [
            replace(CAT, base_hash="aaaaaaaaaaaa"),
            VASE,
            replace(DOG, base_hash="bbbbbbbbbbbb"),
        ]
        with pytest.raises(IncompatibleModelError) as caught:
            merge(concepts)
        message = str(caught.value)
        assert "aaaaaaaa" in message
        assert "bbbbbbbb" in message
        assert "Train them on the same one" in message

    def test_the_clip_of_another_model(self) -> None:
        with pytest.raises(IncompatibleModelError) as caught:
            merge([CAT, DOG], encoder=RecurrentTextEncoder(48))
        message = str(caught.value)
        assert f"text width {WIDTH}" in message
        assert "width 48" in message
        assert "Connect the CLIP" in message

    def test_nothing_to_merge(self) -> None:
        with pytest.raises(MergeError, match="Connect at least two"):
            merge([])

    @pytest.mark.parametrize("strengths", [[], [1.0], [1.0] * 3])
    def test_strengths_for_another_number_of_concepts(self, strengths: list[float]) -> None:
        with pytest.raises(MergeError) as caught:
            merge([CAT, DOG], strengths)
        assert f"{len(strengths)} strengths were given for 2 concepts" in str(caught.value)

    def test_a_concept_without_words(self) -> None:
        with pytest.raises(MergeError) as caught:
            merge([CAT, random_concept(None)])
        assert "names no word to keep" in str(caught.value)
        assert "trigger word" in str(caught.value)

    @pytest.mark.parametrize("prompt", ["", "   ", "word " * 100 + "<new1> cat"])
    def test_a_prompt_in_which_the_encoder_finds_no_subject(self, prompt: str) -> None:
        """Blank, or cut off by the encoder before the modifier token."""
        with pytest.raises(MergeError) as caught:
            merge([replace(CAT, constraint_prompts=(prompt,)), DOG])
        assert "<new1>" in str(caught.value)

    def test_no_captions(self) -> None:
        with pytest.raises(MergeError, match="captions"):
            merge([CAT, DOG], captions=[])

    def test_an_embedding_that_is_not_finite(self) -> None:
        broken = torch.full((1, WIDTH), float("nan"))
        (token,) = CAT.tokens
        concept = replace(CAT, tokens=(replace(token, embeddings={"clip_l": broken}),))
        with pytest.raises(MergeError, match="finite"):
            merge([concept, DOG])

    def test_a_wrong_pair_is_refused_before_any_caption_is_encoded(self) -> None:
        """Encoding takes a while with a real text encoder."""
        encoder = RecurrentTextEncoder(WIDTH)
        encoder.refuse = True
        with pytest.raises(TokenError):
            merge([CAT, replace(DOG, tokens=CAT.tokens)], encoder=encoder)


class TestCaptionCache:
    def test_the_second_time_no_caption_is_encoded(self, tmp_path: Path) -> None:
        encoder = RecurrentTextEncoder(WIDTH)
        first = cached_caption_factor(encoder, CAPTIONS, RIDGE, tmp_path)
        encoder.refuse = True
        second = cached_caption_factor(encoder, CAPTIONS, RIDGE, tmp_path)
        assert torch.equal(first.upper, second.upper)
        assert second.upper.dtype == torch.float64
        assert second.captions == first.captions == len(CAPTIONS)
        assert len(list(tmp_path.iterdir())) == 1

    def test_a_stopped_encoding_leaves_no_file(self, tmp_path: Path) -> None:
        def stop(fraction: float) -> None:
            if fraction > 0.3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cached_caption_factor(
                RecurrentTextEncoder(WIDTH), CAPTIONS, RIDGE, tmp_path, on_progress=stop
            )
        assert not list(tmp_path.iterdir())

    def test_a_merge_with_the_cache_equals_one_without(self, tmp_path: Path) -> None:
        expected, _ = merge([CAT, DOG])
        for _ in range(2):
            merged, _ = merge([CAT, DOG], cache=tmp_path / "cache")
            for layer in LAYERS:
                assert torch.equal(change_of(merged, layer), change_of(expected, layer))
        assert len(list((tmp_path / "cache").iterdir())) == 1

    def test_other_concepts_share_the_file(self, tmp_path: Path) -> None:
        """It belongs to the base model's text encoder, not to the words that concepts add."""
        merge([CAT, DOG], cache=tmp_path)
        merge([VASE], cache=tmp_path)
        assert len(list(tmp_path.iterdir())) == 1

    def test_whatever_changes_the_factor_gets_a_file_of_its_own(self, tmp_path: Path) -> None:
        encoder = RecurrentTextEncoder(WIDTH)
        variants = [
            (encoder, CAPTIONS, RIDGE),
            (encoder, CAPTIONS[:-1], RIDGE),
            (encoder, [*CAPTIONS[:-1], "another caption"], RIDGE),
            (encoder, [*CAPTIONS[:-2], "\n".join(CAPTIONS[-2:])], RIDGE),
            (RecurrentTextEncoder(WIDTH, seed=1), CAPTIONS, RIDGE),
            (encoder, CAPTIONS, 2 * RIDGE),
        ]
        for number, (variant, captions, ridge) in enumerate(variants, start=1):
            found = cached_caption_factor(variant, captions, ridge, tmp_path)
            assert len(list(tmp_path.iterdir())) == number
            expected = cached_caption_factor(variant, captions, ridge, None)
            assert torch.equal(found.upper, expected.upper)

    @pytest.mark.parametrize("damage", ["cut", "empty", "text", "other tensors", "other width"])
    def test_a_damaged_file_is_named_with_the_remedy(self, tmp_path: Path, damage: str) -> None:
        merge([CAT, DOG], cache=tmp_path)
        (path,) = tmp_path.iterdir()
        content = path.read_bytes()
        if damage == "other tensors":
            save_file({"lower": torch.zeros(2, 2)}, path)
        elif damage == "other width":
            save_file({"upper": load_file(path)["upper"][:-1, :-1].contiguous()}, path)
        else:
            path.write_bytes({"cut": content[:-100], "empty": b"", "text": b"x" * 99}[damage])
        with pytest.raises(MergeError) as caught:
            merge([CAT, DOG], cache=tmp_path)
        assert str(path) in str(caught.value)
        assert "Delete this file" in str(caught.value)

    def test_a_cache_folder_that_cannot_be_written_says_so(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(ConceptFileError, match="could not be written"):
            merge([CAT, DOG], cache=tmp_path / "file" / "cache")

    @pytest.mark.skipif(os.name == "nt", reason="uses POSIX limits")
    @pytest.mark.slow
    def test_a_full_disk_is_an_error_that_can_be_read(self, tmp_path: Path) -> None:
        """Real failing writes: the process may not write a file larger than 4 KiB."""
        code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
import conftest
import resource, signal
from pathlib import Path
from custom_diffusion.concept.errors import ConceptFileError
from custom_diffusion.merge.caption_cache import cached_caption_factor
from support.text import RecurrentTextEncoder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    cached_caption_factor(RecurrentTextEncoder({WIDTH}), ["a cat"] * 20, 1e-4, Path("cache"))
except ConceptFileError as error:
    print(error)
"""
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert "could not be written" in result.stdout, result.stderr
        assert "MB are free" in result.stdout
        assert list((tmp_path / "cache").iterdir()) == []


class TestUnpaddedEncoding:
    def test_it_equals_encoding_each_padded_prompt_alone(self) -> None:
        """Exact, because the encoder is causal; in the order of the prompts."""
        encoder = RecurrentTextEncoder(WIDTH)
        ids = [encoder.tokenize(caption) for caption in CAPTIONS]
        together = encode_unpadded(encoder, ids, batch_size=7)
        for prompt, features in zip(ids, together, strict=True):
            alone = encoder.encode(encoder.pad([prompt]))[0, : len(prompt)]
            torch.testing.assert_close(features, alone, rtol=1e-5, atol=1e-4)

    def test_no_padding_is_encoded_and_batches_are_few(self) -> None:
        encoder = RecurrentTextEncoder(WIDTH)
        ids = [encoder.tokenize("a cat")] * 10 + [encoder.tokenize("a big cat")] * 10
        encode_unpadded(encoder, ids, batch_size=5)
        assert encoder.calls == 4

    def test_no_gradient_is_recorded(self) -> None:
        encoder = knowing([CAT])
        rows = CAT.tokens[0].embeddings["clip_l"].clone().requires_grad_()
        encoder = RecurrentTextEncoder(WIDTH).with_tokens({"clip_l": {"<new1>": rows}})
        (features,) = encode_unpadded(encoder, [encoder.tokenize("<new1> cat")])
        assert not features.requires_grad


def test_a_narrow_family_describes_itself_like_the_real_one() -> None:
    """The helpers' family differs from Stable Diffusion 1.x in nothing but its width."""
    real = FAMILIES["sd15"]
    assert narrow_family(real.context_width) == real
