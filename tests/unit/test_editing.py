"""Edit Concepts against formulas solved by hand in float64, for one matrix after the other.

Rows and targets are gathered here, prompt by prompt; the solutions are Lagrange multipliers and the
published formula of Unified Concept Editing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from custom_diffusion.compression.ranks import compress
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.delta import LowRankDelta
from custom_diffusion.concept.errors import IncompatibleModelError, MergeError
from custom_diffusion.concept.file import read_concept, write_concept
from custom_diffusion.formats.exporting import export_concept
from custom_diffusion.inspection.card import read_card
from custom_diffusion.inspection.report import inspect_concept
from custom_diffusion.merge.captions import regularization_captions
from custom_diffusion.merge.edit_report import LARGE_MOVE, EditReport
from custom_diffusion.merge.editing import edit_again, edit_concept
from custom_diffusion.merge.edits import Edit, edits_of, read_amounts, read_words, restored
from safetensors.torch import load_file
from support.concepts import KEY, Matrix, base_weights, random_concept, solve_by_multipliers
from support.merging import change_of, distance
from support.text import RecurrentTextEncoder

WIDTH = 128
RIDGE = 1e-4
CAPTIONS = regularization_captions(80, seed=2)
ENCODER = RecurrentTextEncoder(WIDTH)
WEIGHTS = base_weights(WIDTH)
TEMPLATES = ("{}", "photo of a {}")


def edit(
    *edits: Edit, weights: dict[str, Any] = WEIGHTS, **more: Any
) -> tuple[Concept, EditReport]:
    more = {"captions": CAPTIONS, "relative_ridge": RIDGE, **more}
    return edit_concept(weights, RecurrentTextEncoder(WIDTH), edits, **more)


def features(prompt: str) -> Matrix:
    """Of every position, each prompt by itself."""
    ids = torch.tensor([ENCODER.tokenize(prompt)])
    return ENCODER.encode(ids)[0].double().numpy()


def both_ends(word: str) -> list[Matrix]:
    """The word and the end of text in each template."""
    return [features(template.format(word))[-2:] for template in TEMPLATES]


def staying(words: Sequence[str]) -> Matrix:
    padded = ENCODER.encode(ENCODER.pad([ENCODER.tokenize("")]))[0].double().numpy()
    rows = [features(""), padded[-1:], *(rows for word in words for rows in both_ends(word))]
    return np.concatenate(rows)


def caption_gram() -> Matrix:
    rows = np.concatenate([features(caption)[1:] for caption in CAPTIONS])
    gram = rows.T @ rows
    return gram + RIDGE * np.trace(gram) / WIDTH * np.eye(WIDTH)


def erased_moves(word: str) -> Matrix:
    """To the start of text, and to the end of the prompt without the word."""
    moves = []
    for template, rows in zip(TEMPLATES, both_ends(word), strict=True):
        without = features(template.format("").strip())
        moves.append(np.stack([without[0], without[-1]]) - rows)
    return np.concatenate(moves)


class TestEquation:
    @pytest.mark.parametrize("preserved", [(), ("dog", "red car")], ids=str)
    def test_the_hard_edit_is_the_constrained_least_squares(
        self, preserved: tuple[str, ...]
    ) -> None:
        made, report = edit(Edit("cat"), preserved=preserved)
        assert not report.damped
        c = np.concatenate([*both_ends("cat"), staying(preserved)])
        moves = np.zeros_like(c)
        moves[:4] = erased_moves("cat")
        upper = np.linalg.cholesky(caption_gram()).T
        for layer, weight in WEIGHTS.items():
            w = weight.double().numpy()
            solved = solve_by_multipliers(w, upper, c, (c + moves) @ w.T)
            assert distance(change_of(made, layer), torch.from_numpy(solved - w)) < 1e-4

    def test_the_soft_edit_without_captions_is_unified_concept_editing(self) -> None:
        """W = (λ W₀ + a Σ v c' + a Σ W₀ c c')(λ I + a Σ c c')⁻¹, as published."""
        c, keep = np.concatenate(both_ends("cat")), staying(["dog"])
        gram, every = 0.5 * np.eye(WIDTH), np.concatenate([c, keep])
        largest = np.linalg.eigvalsh(every @ np.linalg.inv(gram) @ every.T)[-1]
        a = 0.05
        made, _ = edit(
            Edit("cat", "bird"), preserved=["dog"], softness=1 / (a * largest), captions=()
        )
        targets = np.concatenate(both_ends("bird"))
        for layer, weight in WEIGHTS.items():
            w = weight.double().numpy()
            left = 0.5 * w + a * (w @ targets.T @ c + w @ keep.T @ keep)
            uce = left @ np.linalg.inv(gram + a * (c.T @ c + keep.T @ keep))
            assert distance(change_of(made, layer), torch.from_numpy(uce - w)) < 1e-4

    @pytest.mark.parametrize(
        ("asked", "moves"),
        [
            (Edit("cat", "dog"), lambda: np.concatenate(both_ends("dog")) - CAT_ROWS),
            (Edit("cat", share=0.3), lambda: 0.3 * erased_moves("cat")),
            (
                Edit("cat", attributes=(("red", 0.5), ("blue", -0.25))),
                lambda: np.concatenate(
                    [
                        0.5 * red - 0.25 * blue
                        for red, blue in zip(both_ends("red"), both_ends("blue"), strict=True)
                    ]
                ),
            ),
        ],
        ids=["replace", "moderate", "debias"],
    )
    def test_every_row_becomes_what_was_asked(self, asked: Edit, moves: Any) -> None:
        made, report = edit(asked)
        for layer, weight in WEIGHTS.items():
            w = weight.double().numpy()
            got = CAT_ROWS @ change_of(made, layer).numpy().T
            assert np.abs(got - moves() @ w.T).max() < 1e-4 * np.abs(moves() @ w.T).max()
        assert report.edited[0][2] < 1e-4

    def test_start_of_text_and_empty_prompt_stay(self) -> None:
        made, _ = edit(Edit("cat"), Edit("dog", "bird"))
        for layer, weight in WEIGHTS.items():
            moved = staying([]) @ change_of(made, layer).numpy().T
            assert (
                np.abs(moved).max() < 1e-4 * np.abs(staying([]) @ weight.double().numpy().T).max()
            )

    def test_order_changes_not_a_bit(self) -> None:
        edits = [Edit("cat"), Edit("dog", "bird"), Edit("car", share=0.5)]
        one, _ = edit(*edits, preserved=["tree", "house"])
        other, _ = edit(*reversed(edits), preserved=["house", "tree"])
        assert equal(one, other)


CAT_ROWS = np.concatenate(both_ends("cat"))


class TestRestoring:
    def test_the_word_that_stays_edited_is_as_if_alone(self) -> None:
        both, _ = edit(Edit("cat"), Edit("dog", "bird"))
        left = restored(edits_of(both.provenance), {"cat": 1.0})
        assert left == (Edit("dog", "bird"),)
        assert equal(edit(*left)[0], edit(Edit("dog", "bird"))[0])

    def test_by_strength(self) -> None:
        half, _ = edit(*restored((Edit("cat"),), {"cat": 0.5}))
        whole, _ = edit(Edit("cat"))
        assert distance(2 * change_of(half, KEY), change_of(whole, KEY)) < 1e-6

    def test_wholly_gives_the_base_to_the_bit(self) -> None:
        made, _ = edit(Edit("cat"))
        encoder = RecurrentTextEncoder(WIDTH)
        nothing, report = edit_again(made, WEIGHTS, encoder, [], restore={"cat": 1.0})
        assert "base model" in report.text() and not report.table()[1:]
        for layer, weight in WEIGHTS.items():
            assert torch.equal(weight + nothing.deltas[layer].dense(), weight)

    def test_an_earlier_edit_is_solved_anew_together(self) -> None:
        first, _ = edit(Edit("cat"), preserved=["tree"])
        more = {"captions": CAPTIONS, "relative_ridge": RIDGE}
        encoder = RecurrentTextEncoder(WIDTH)
        again, _ = edit_again(first, WEIGHTS, encoder, [Edit("dog")], preserved=["car"], **more)
        at_once, _ = edit(Edit("dog"), Edit("cat"), preserved=["car", "tree"])
        assert equal(again, at_once)
        with pytest.raises(IncompatibleModelError, match="another checkpoint"):
            edit_again(first, base_weights(WIDTH, seed=1), encoder, [Edit("dog")], **more)


class TestReport:
    def test_moves_are_those_of_keys_and_values(self) -> None:
        made, report = edit(Edit("cat"), preserved=["dog"])
        for word, share in [("cat", report.edited[0][1]), *report.preserved, *report.neighbours]:
            c = features(f"photo of a {word}")[-2]
            now = np.concatenate([w.double().numpy() @ c for w in WEIGHTS.values()])
            moved = np.concatenate([change_of(made, layer).numpy() @ c for layer in WEIGHTS])
            assert share == pytest.approx(np.linalg.norm(moved) / np.linalg.norm(now), abs=1e-4)
        assert report.preserved[0][1] < 1e-4
        assert [s for _, s in report.neighbours] == sorted(
            (s for _, s in report.neighbours), reverse=True
        )

    def test_neighbours_that_move_are_warned_of_with_figures(self) -> None:
        _, report = edit(Edit("cat"), relative_ridge=1.0)  # the captions hold nothing
        word, share = report.neighbours[0]
        assert share > LARGE_MOVE
        assert any(f"moved '{word}' by {share:.0%}" in warning for warning in report.warnings())
        assert not edit(Edit("cat", share=0.01))[1].warnings()

    def test_a_split_word_is_told_of(self) -> None:
        _, report = edit(Edit("semi-circle"))
        assert any("'semi-circle' as 3 pieces" in warning for warning in report.warnings())


class TestWithoutWords:
    """The result is a concept like any other, everywhere."""

    def test_file_card_inspection_and_lora(self, tmp_path: Path) -> None:
        made, _ = edit(Edit("cat"), Edit("dog", "bird"))
        path = write_concept(made, tmp_path / "edit.safetensors", torch.float32)
        again = read_concept(path)
        assert equal(made, again) and edits_of(again.provenance) == edits_of(made.provenance)
        assert again.describe().startswith("edit of cat, dog (")
        assert read_card(path).prompts == ()
        assert "edit" in inspect_concept(again, path).text()
        (lora,) = export_concept(again, tmp_path / "lora.safetensors", "comfyui-lora")
        assert f"diffusion_model.{KEY}.lora_up.weight" in load_file(lora)

    def test_compressed(self) -> None:
        made, _ = edit(Edit("cat"), Edit("dog", "bird"))
        small, _ = compress(made, rank=2)
        assert all(delta.rank == 2 for delta in small.deltas.values())

    def test_merged_with_a_taught_concept_both_keep_what_they_do(self) -> None:
        from custom_diffusion.merge.merging import merge_concepts

        made, _ = edit(Edit("dog", "bird"))
        cat = random_concept("<new1>", "cat", family=made.family)
        merged, report = merge_concepts(
            [cat, made], RecurrentTextEncoder(WIDTH), captions=CAPTIONS, relative_ridge=RIDGE
        )
        assert max(report.residuals) < 1e-3
        dog = np.concatenate(both_ends("dog"))
        wanted = dog @ change_of(made, KEY).numpy().T
        assert np.abs(dog @ change_of(merged, KEY).numpy().T - wanted).max() < 1e-3


@pytest.mark.parametrize(
    ("asked", "preserved", "message"),
    [
        ([], (), "No edit"),
        ([Edit("cat")], ("cat",), "edited and preserved at once"),
        ([Edit("cat")], ("Cat",), "the same to the text encoder"),
        ([Edit("cat"), Edit("cat", "dog")], (), "edited twice"),
        ([Edit("cat"), Edit("CAT", "dog")], (), "the same to the text encoder"),
        ([Edit("a-" * 40)], (), "more than the text encoder reads"),
    ],
)
def test_bad_edits_are_refused(asked: list[Edit], preserved: tuple[str, ...], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        edit(*asked, preserved=preserved)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Edit(" "), "names no word"),
        (lambda: Edit("cat", "cat"), "become itself"),
        (lambda: Edit("cat", share=0.0), "more than 0"),
        (lambda: Edit("cat", share=float("nan")), "more than 0"),
        (lambda: Edit("cat", attributes=(("red", 9.0),)), "between -4 and 4"),
        (lambda: Edit("cat", attributes=(("red", float("nan")),)), "between -4 and 4"),
        (lambda: read_amounts("red, blue"), "no attribute"),
        (lambda: read_amounts(""), "each with its amount"),
        (lambda: restored((Edit("cat"),), {"dog": 1.0}), "has not touched it"),
        (lambda: restored((Edit("cat"),), {"cat": 2.0}), "0 to 1 is needed"),
        (lambda: edits_of({}), "not the result of Edit Concepts"),
        (lambda: edits_of({"edits": [{"word": "cat"}]}), "cannot be read"),
    ],
)
def test_slips_are_named(make: Any, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        make()


def test_targets_of_another_width_are_refused() -> None:
    with pytest.raises(IncompatibleModelError, match="width 64"):
        edit_concept(WEIGHTS, RecurrentTextEncoder(64), [Edit("cat")], captions=CAPTIONS)
    with pytest.raises(IncompatibleModelError, match="no cross-attention"):
        edit_concept({}, RecurrentTextEncoder(WIDTH), [Edit("cat")], captions=CAPTIONS)


def test_words_are_read_between_commas_and_lines() -> None:
    assert read_words("cat,  red  car\n, cat\ndog") == ("cat", "red car", "dog")
    assert read_amounts("red: 0.5\nblue:-.25") == (("red", 0.5), ("blue", -0.25))


def equal(one: Concept, other: Concept) -> bool:
    pairs = ((one.deltas[layer], other.deltas[layer]) for layer in one.deltas)
    return one.layers == other.layers and all(
        isinstance(a, LowRankDelta)
        and isinstance(b, LowRankDelta)
        and torch.equal(a.up, b.up)
        and torch.equal(a.down, b.down)
        for a, b in pairs
    )
