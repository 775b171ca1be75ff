"""What the kinds of a delta say of themselves, against the matrix that they stand for; and that a
kind which is no matrix is used row by row and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from custom_diffusion.composition.routing import Route, RowChanges
from custom_diffusion.concept.delta import KINDS, Delta, DenseDelta, LowRankDelta, delta_of
from custom_diffusion.concept.errors import IncompatibleModelError
from custom_diffusion.concept.file import concept_tensors, delta_tensors, embedding_tensors
from custom_diffusion.formats.exporting import FORMATS, bake, export_concept
from custom_diffusion.host.diffusers.sampling import applied_concept
from diffusers import StableDiffusionPipeline
from support.made_concepts import concept_for
from support.tiny_models import CONTEXT_WIDTH, tiny_pipeline
from torch import Tensor

OUT, WIDTH, RANK = 6, 4, 2


@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    return tiny_pipeline()


def made(kind: type) -> tuple[Delta, Tensor]:
    """One of the kind, and its matrix."""
    torch.manual_seed(0)
    up, down = torch.randn(OUT, RANK), torch.randn(RANK, WIDTH)
    if kind is DenseDelta:
        return DenseDelta(up @ down), up @ down
    return LowRankDelta(up, down), up @ down


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_kind_says_is_true_of_its_matrix(kind: type) -> None:
    delta, matrix = made(kind)
    rows = torch.randn(3, WIDTH)
    assert delta.is_weight_patch and delta.shape == (OUT, WIDTH)
    torch.testing.assert_close(delta.dense(), matrix)
    torch.testing.assert_close(delta.map_rows(rows), rows @ matrix.T)
    assert delta.squared_norm() == pytest.approx(float(matrix.norm()) ** 2, rel=1e-5)
    stored = [tensor for tensor in delta.tensors().values() if tensor.ndim]
    assert delta.numbers == sum(tensor.numel() for tensor in stored)
    for factor in (-3.0, 0.5):
        torch.testing.assert_close(delta.scaled(factor).dense(), factor * matrix)
    assert not delta.is_zero() and delta.scaled(0).is_zero()
    again = delta_of("layer", delta.tensors())
    assert type(again) is kind and torch.equal(again.dense(), delta.dense())
    factors = delta.factors
    assert delta.rank == (factors.rank if factors else None)
    if factors is not None:
        assert torch.equal(factors.up @ factors.down, delta.dense())


def test_a_concept_tells_its_changes_from_its_words(pipeline: StableDiffusionPipeline) -> None:
    concept = concept_for(pipeline, "<new1>", "cat", 0)
    changes, words = delta_tensors(concept), embedding_tensors(concept)
    assert changes == delta_tensors(replace(concept, tokens=())) and words
    assert words.keys() == embedding_tensors(replace(concept, deltas={})).keys()
    assert [*concept_tensors(concept)] == [*changes, *words]


@dataclass(frozen=True)
class Gated(DenseDelta):
    """Acts on rows of a positive sum alone: no one matrix does that."""

    is_weight_patch: ClassVar[bool] = False

    def dense(self) -> Tensor:
        raise AssertionError("there is no matrix")

    def map_rows(self, rows: Tensor) -> Tensor:
        return super().map_rows(rows) * (rows.sum(1, keepdim=True) > 0)


def test_what_is_no_weight_patch_acts_row_by_row_and_is_added_to_no_weight(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    concept = concept_for(pipeline, "<new1>", "cat", 0)
    layer = concept.layers[0]
    weight = torch.ones(concept.deltas[layer].shape)
    gated = replace(concept, deltas={layer: Gated(weight)})
    rows = torch.stack([torch.ones(CONTEXT_WIDTH), -torch.ones(CONTEXT_WIDTH)])
    (added,) = RowChanges.of([Route(gated)], [rows]).by_layer.values()
    assert added[1].eq(CONTEXT_WIDTH).all() and not added[2].any()
    with (
        pytest.raises(IncompatibleModelError, match=f"1 layers otherwise .*{layer}"),
        applied_concept(pipeline, gated),
    ):
        pass
    for kind in FORMATS:
        with pytest.raises(IncompatibleModelError, match="otherwise than by their weights"):
            export_concept(gated, tmp_path / "cat", kind)
    with pytest.raises(IncompatibleModelError, match="otherwise than by their weights"):
        bake(gated, tmp_path / "absent.safetensors", tmp_path / "cat.safetensors")
