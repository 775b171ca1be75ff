"""Low-rank training in fixed bases: what is disjoint, what learns, and what a sum then keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.delta import LowRankDelta
from custom_diffusion.concept.errors import ConfigError
from custom_diffusion.host.diffusers.lending import DiffusersModels
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.learning.disjoint_bases import DisjointProjections, disjoint_basis
from custom_diffusion.trainer.loop import train
from support.tiny_models import RESOLUTION, cat_concept, random_bank

RANK = 3


def taught(models: DiffusersModels, basis: int, **options: Any) -> Concept:
    concept = cat_concept()
    bank = random_bank(concept)
    settings = TrainConfig(
        method="low-rank",
        rank=RANK,
        basis=basis,
        steps=2,
        batch_size=2,
        learning_rate=1e-2,
        resolution=RESOLUTION,
        preview_every_steps=0,
    )
    return train(settings, [concept], [bank], models.denoiser, models.text_encoder, **options)


def test_bases_of_one_rank_share_nothing() -> None:
    bases = [disjoint_basis(24, RANK, number) for number in (1, 2, 8)]
    every = torch.cat(bases).double()
    assert torch.allclose(3 * every @ every.T, torch.eye(9).double(), atol=1e-6)
    assert torch.equal(bases[1], disjoint_basis(24, RANK, 2))
    with pytest.raises(ConfigError, match="Basis 9 of rank 3.*room for 8"):
        disjoint_basis(24, RANK, 9)


def test_only_up_learns_and_a_sum_keeps_what_each_does_in_its_basis(
    models: DiffusersModels,
) -> None:
    one, two = taught(models, 1), taught(models, 2)
    width = models.text_encoder.context_width
    own, other = (disjoint_basis(width, RANK, number) for number in (1, 2))
    for layer, delta in one.deltas.items():
        assert isinstance(delta, LowRankDelta)
        assert torch.equal(delta.down, own) and delta.up.any()
        second = two.deltas[layer]
        both = delta.dense() + second.dense()
        assert torch.allclose(both @ own.T, delta.map_rows(own).T, atol=1e-6)
        assert torch.allclose(both @ other.T, second.map_rows(other).T, atol=1e-6)
    usual = taught(models, 0)
    downs = [delta.factors.down for delta in usual.deltas.values() if delta.factors]
    assert not torch.equal(downs[0], downs[1])


def test_one_step_of_up_is_that_of_a_plain_product(models: DiffusersModels) -> None:
    """Keys and values are W₀ c + A B c, of which A alone has a gradient."""
    made = DisjointProjections(models.denoiser, {}, RANK, 0, 2)
    context = torch.randn(2, 5, models.text_encoder.context_width)
    weight = torch.randn(2, 5, len(made.up))
    (made._keys_values(context) * weight).sum().backward()
    rows = disjoint_basis(context.shape[-1], RANK, 2)
    wanted = torch.einsum("bno,bnd,rd->or", weight, context, rows)
    assert torch.allclose(made.up.grad, wanted, rtol=1e-3, atol=1e-3)  # type: ignore[arg-type]
    assert made.down.grad is None and made.parameters() == [made.up]


def test_a_concept_is_trained_further_in_its_own_basis_alone(models: DiffusersModels) -> None:
    one = taught(models, 1)
    further = DisjointProjections(models.denoiser, one.deltas, RANK, 0, 1)
    for layer, delta in further.deltas().items():
        assert torch.allclose(delta.dense(), one.deltas[layer].dense(), atol=1e-6)
    with pytest.raises(ConfigError, match="was not trained in basis 2"):
        DisjointProjections(models.denoiser, one.deltas, RANK, 0, 2)
