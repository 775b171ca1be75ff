"""Frozen layers that keep less: the same numbers, less memory, in both hosts' kinds of blocks."""

from __future__ import annotations

import pytest
import torch
from custom_diffusion.host.diffusers.lending import DiffusersModels
from custom_diffusion.trainer.economy.backward import recomputed
from custom_diffusion.trainer.economy.frozen_layers import keeping_less
from support.kept import kept_bytes
from support.tiny_models import RESOLUTION
from torch import Tensor, nn


def prediction_and_gradient(models: DiffusersModels, dtype: torch.dtype) -> list[Tensor]:
    """Of the UNet for four latents, with the gradient of the context; and what was kept."""
    network = models.denoiser.network.to(dtype)
    draw = torch.Generator().manual_seed(0)
    edge = RESOLUTION // 8
    latents = torch.randn(4, 4, edge, edge, generator=draw).to(dtype)
    context = torch.randn(4, 77, models.denoiser.family.context_width, generator=draw).to(dtype)
    context.requires_grad_(True)
    with kept_bytes(network.parameters()) as total:
        out = network(latents, torch.tensor([1, 20, 300, 900]), context).sample
    out.square().sum().backward()
    assert context.grad is not None
    return [out.detach(), context.grad, torch.tensor(total[0])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_numbers_in_two_thirds_of_the_memory(
    models: DiffusersModels, dtype: torch.dtype
) -> None:
    whole = prediction_and_gradient(models, dtype)
    with keeping_less(models.denoiser.network):
        less = prediction_and_gradient(models, dtype)
    assert torch.equal(less[0], whole[0])
    assert torch.equal(less[1], whole[1])
    assert less[2] < 0.7 * whole[2]


def test_blocks_that_are_computed_twice_keep_less_inside(models: DiffusersModels) -> None:
    denoiser = models.denoiser
    whole = prediction_and_gradient(models, torch.float32)
    with keeping_less(denoiser.network), recomputed(denoiser.network, denoiser.blocks):
        less = prediction_and_gradient(models, torch.float32)
    assert torch.equal(less[0], whole[0])
    torch.testing.assert_close(less[1], whole[1])


def test_a_network_that_learns_is_left_alone(models: DiffusersModels) -> None:
    network = models.denoiser.network
    next(network.parameters()).requires_grad_(True)
    with keeping_less(network):
        assert all("forward" not in vars(part) for part in network.modules())


def test_the_network_is_as_before_afterwards(models: DiffusersModels) -> None:
    network = models.denoiser.network
    with pytest.raises(RuntimeError, match="on the way"), keeping_less(network):
        assert any("forward" in vars(part) for part in network.modules())
        raise RuntimeError("on the way")
    assert all("forward" not in vars(part) for part in network.modules())


def test_other_ways_to_use_the_layers() -> None:
    """A SiLU without a norm before it, a convolution that pads by reflection, or by a word."""
    layers = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding="same"),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.GroupNorm(2, 8, affine=False),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, stride=2, dilation=2, groups=4, bias=False),
        nn.GroupNorm(2, 8),
        nn.Conv2d(8, 4, 1),
    ).requires_grad_(False)
    images = torch.randn(2, 4, 12, 12, dtype=torch.float32, requires_grad=True)
    (wanted,) = torch.autograd.grad(layers(images).square().sum(), images)
    with keeping_less(layers):
        (found,) = torch.autograd.grad(layers(images).square().sum(), images)
    assert torch.equal(found, wanted)
