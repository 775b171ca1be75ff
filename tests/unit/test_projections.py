"""The trained key and value projections: lent to the network, taken back, and their gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from custom_diffusion.concept.concept import hash_projections
from custom_diffusion.host.diffusers.denoiser import DiffusersDenoiser
from custom_diffusion.host.diffusers.lending import DiffusersModels
from custom_diffusion.trainer.learning import projections as projections_file
from custom_diffusion.trainer.learning.projections import DenseProjections
from support.tiny_models import CONTEXT_WIDTH, requires_grad_map, same_state, state, training_map
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def denoiser(models: DiffusersModels) -> DiffusersDenoiser:
    return models.denoiser


@pytest.fixture
def inputs() -> Inputs:
    """Noisy latents, timesteps and text features of two samples."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 11, CONTEXT_WIDTH, generator=generator)
    return latents, torch.tensor([10, 700]), context


@contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    """Asserts that the network is the very same afterwards."""
    modules = [(name, id(module)) for name, module in network.named_modules()]
    parameters = [(name, id(p)) for name, p in network.named_parameters()]
    weights, flags, modes = state(network), requires_grad_map(network), training_map(network)
    yield
    assert [(name, id(module)) for name, module in network.named_modules()] == modules
    assert [(name, id(p)) for name, p in network.named_parameters()] == parameters
    assert same_state(weights, network)
    assert requires_grad_map(network) == flags
    assert training_map(network) == modes


class CutLinear(nn.Module):
    """The reference: one projection of its own whose output is detached where `keep` is zero."""

    def __init__(self, weight: Tensor, keep: Tensor) -> None:
        super().__init__()
        self.weight, self.keep = nn.Parameter(weight.clone()), keep

    def forward(self, context: Tensor) -> Tensor:
        output = F.linear(context, self.weight)
        return torch.where(self.keep[..., None].bool(), output, output.detach())


def reference_gradients(
    denoiser: DiffusersDenoiser, inputs: Inputs, keep: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of every projection by layer, and of the text features."""
    latents, timesteps, context = inputs
    context = context.clone().requires_grad_(True)
    network = copy.deepcopy(denoiser.network)
    replaced = {}
    for layer, path in denoiser.projections.items():
        parent, _, name = path.rpartition(".")
        replaced[layer] = CutLinear(network.get_parameter(f"{path}.weight").detach(), keep)
        setattr(network.get_submodule(parent), name, replaced[layer])
    output = network(latents, timesteps, encoder_hidden_states=context).sample
    output.square().mean().backward()
    assert context.grad is not None
    gradients = {layer: module.weight.grad for layer, module in replaced.items()}
    return {k: g for k, g in gradients.items() if g is not None}, context.grad


def our_gradients(
    denoiser: DiffusersDenoiser, inputs: Inputs, keep: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    latents, timesteps, context = inputs
    context = context.clone().requires_grad_(True)
    projections = DenseProjections(denoiser, {})
    with projections.installed():
        projections.predict(latents, timesteps, context, passing=keep).square().mean().backward()
    gradient = projections.weight.grad
    assert gradient is not None
    assert context.grad is not None
    with torch.no_grad():  # a step along the gradient makes the deltas name its parts
        projections.weight += 1024 * gradient
    deltas = projections.deltas()
    return {k: (d.weight / 1024) for k, d in deltas.items()}, context.grad


def assert_same_gradients(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert ours.keys() == wanted.keys()
    for layer, gradient in wanted.items():
        error = (ours[layer] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 1e-3, layer


def test_the_network_is_the_very_same_after_the_projections_were_installed(
    denoiser: DiffusersDenoiser, inputs: Inputs
) -> None:
    with unchanged(denoiser.network):
        projections = DenseProjections(denoiser, {})
        with projections.installed():
            projections.predict(*inputs).mean().backward()
            with torch.no_grad():
                projections.weight += 1


def test_the_network_is_the_very_same_after_an_exception(denoiser: DiffusersDenoiser) -> None:
    with (
        unchanged(denoiser.network),
        pytest.raises(RuntimeError, match="in the middle"),
        DenseProjections(denoiser, {}).installed(),
    ):
        raise RuntimeError("in the middle")


def test_the_network_is_the_very_same_after_it_failed_itself(
    denoiser: DiffusersDenoiser, inputs: Inputs
) -> None:
    projections = DenseProjections(denoiser, {})
    latents, timesteps, context = inputs
    with (
        unchanged(denoiser.network),
        pytest.raises(RuntimeError),
        projections.installed(),
    ):
        projections.predict(latents[:, :3], timesteps, context)


def test_projections_can_be_installed_again(denoiser: DiffusersDenoiser, inputs: Inputs) -> None:
    projections = DenseProjections(denoiser, {})
    with torch.no_grad():
        outputs = []
        for _ in range(2):
            with projections.installed():
                outputs.append(projections.predict(*inputs))
    assert torch.equal(*outputs)


def test_untrained_projections_predict_what_the_network_predicts(
    denoiser: DiffusersDenoiser, inputs: Inputs
) -> None:
    projections = DenseProjections(denoiser, {})
    with torch.no_grad():
        plain = denoiser.predict(*inputs)
        with projections.installed():
            ours = projections.predict(*inputs)
            cut = projections.predict(*inputs, passing=torch.zeros(2, 11))
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)
    assert torch.equal(cut, ours)


def test_trained_projections_predict_as_if_their_deltas_were_added(
    denoiser: DiffusersDenoiser, inputs: Inputs
) -> None:
    projections = DenseProjections(denoiser, {})
    with torch.no_grad():
        projections.weight += 0.05 * torch.randn_like(projections.weight)
        with projections.installed():
            ours = projections.predict(*inputs)
        network = copy.deepcopy(denoiser.network)
        for layer, delta in projections.deltas().items():
            network.get_parameter(f"{denoiser.projections[layer]}.weight").add_(delta.dense())
        latents, timesteps, context = inputs
        wanted = network(latents, timesteps, encoder_hidden_states=context).sample
        plain = denoiser.predict(*inputs)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    assert (ours - plain).abs().max() > 1e-3


@pytest.mark.parametrize("numbers_in_a_block", [1, 1000, 2**24])
def test_gradients_equal_those_of_one_cut_module_a_projection(
    denoiser: DiffusersDenoiser,
    inputs: Inputs,
    monkeypatch: pytest.MonkeyPatch,
    numbers_in_a_block: int,
) -> None:
    monkeypatch.setattr(projections_file, "_BLOCK", numbers_in_a_block)
    keep = torch.ones(2, 11)
    keep[:, 0] = 0
    keep[1, 6:] = 0
    ours, our_context = our_gradients(denoiser, inputs, keep)
    wanted, wanted_context = reference_gradients(denoiser, inputs, keep)
    assert_same_gradients(ours, wanted)
    torch.testing.assert_close(our_context, wanted_context, atol=1e-8, rtol=1e-3)
    assert not our_context[:, 0].any()
    assert not our_context[1, 6:].any()
    assert our_context[0, 1:].any(-1).all()


def test_gradients_without_a_cut_equal_those_of_the_network_itself(
    denoiser: DiffusersDenoiser, inputs: Inputs
) -> None:
    ours, our_context = our_gradients(denoiser, inputs, None)
    wanted, wanted_context = reference_gradients(denoiser, inputs, torch.ones(2, 11))
    assert_same_gradients(ours, wanted)
    torch.testing.assert_close(our_context, wanted_context, atol=1e-8, rtol=1e-3)
    assert our_context.any(-1).all()


def test_a_cut_changes_the_gradient(denoiser: DiffusersDenoiser, inputs: Inputs) -> None:
    keep = torch.ones(2, 11)
    keep[:, 0] = 0
    cut, _ = our_gradients(denoiser, inputs, keep)
    whole, _ = our_gradients(denoiser, inputs, None)
    values = [layer for layer in cut if layer.endswith("to_v")]
    assert values
    for layer in values:
        assert (cut[layer] - whole[layer]).norm() > 0.05 * whole[layer].norm()


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made while this lasts, but for some."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if torch.is_tensor(t)}
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_a_second_part_adds_its_gradient_without_another_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(projections_file, "_BLOCK", 2**14)
    weight = nn.Parameter(torch.randn(2048, 64))
    parts = torch.randn(2, 3, 5, 64).bfloat16().requires_grad_()
    wanted = nn.Parameter(weight.detach().clone())
    stacked = projections_file.StackedLinear.apply
    stacked(parts[0], weight).square().sum().backward()
    with Largest() as largest:
        stacked(parts[1], weight).square().sum().backward()
    assert largest.bytes < weight.nbytes / 4
    F.linear(parts, wanted.bfloat16()).square().sum().backward()
    assert weight.grad is not None
    assert wanted.grad is not None
    assert (weight.grad - wanted.grad).norm() < 0.01 * wanted.grad.norm()


def test_the_frozen_network_receives_no_gradient(
    denoiser: DiffusersDenoiser, inputs: Inputs
) -> None:
    our_gradients(denoiser, inputs, None)
    assert all(parameter.grad is None for parameter in denoiser.network.parameters())


def test_deltas_are_zero_before_training_and_name_every_projection(
    denoiser: DiffusersDenoiser,
) -> None:
    deltas = DenseProjections(denoiser, {}).deltas()
    assert deltas.keys() == denoiser.projections.keys()
    assert len(deltas) == 12
    for layer, delta in deltas.items():
        weight = denoiser.network.get_parameter(f"{denoiser.projections[layer]}.weight")
        assert delta.shape == tuple(weight.shape)
        assert delta.weight.dtype == torch.float32
        assert not delta.weight.any()


def test_deltas_are_copies(denoiser: DiffusersDenoiser) -> None:
    projections = DenseProjections(denoiser, {})
    deltas = projections.deltas()
    with torch.no_grad():
        projections.weight += 1
    assert not any(delta.weight.any() for delta in deltas.values())
    assert all((delta.weight == 1).any() for delta in projections.deltas().values())


def test_trained_weights_are_float32_when_the_network_is_not(inputs: Inputs) -> None:
    from custom_diffusion.host.diffusers.denoiser import DiffusersDenoiser as Host
    from support.tiny_models import sd_scheduler, tiny_unet, tiny_vae

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = tiny_unet().requires_grad_(False).to(torch.bfloat16)
        denoiser = Host(network, sd_scheduler(), tiny_vae())
    projections = DenseProjections(denoiser, {})
    with projections.installed():
        output = projections.predict(*inputs, passing=torch.ones(2, 11))
    output.square().mean().backward()
    assert projections.weight.dtype == torch.float32
    assert projections.weight.grad is not None
    assert projections.weight.grad.dtype == torch.float32
    assert output.dtype == torch.float32
    assert output.isfinite().all()


def test_the_base_hash_is_that_of_the_networks_own_projections(
    denoiser: DiffusersDenoiser,
) -> None:
    weights = {
        layer: denoiser.network.get_parameter(f"{path}.weight")
        for layer, path in denoiser.projections.items()
    }
    assert DenseProjections(denoiser, {}).base_hash == hash_projections(weights)
