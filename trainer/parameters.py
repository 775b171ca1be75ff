"""What Custom Diffusion trains in the UNet: the key and value projections of every cross-attention
layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..concept.concept import DenseDelta, hash_projections
from ..concept.layers import sort_layers
from .protocols import Denoiser


class KeyValueProjections:
    """All key and value projections as one float32 matrix, trained in place of the network's own.

    Every projection reads the same text features, so all of them are one product:

        context (b, n, d) × weightᵀ (d, Σ out)  →  keys and values of every layer, side by side

    One matrix is one parameter for the optimiser and one place where gradients can be cut.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._layers = sort_layers(denoiser.projections)
        paths = [denoiser.projections[layer] for layer in self._layers]
        weights = [denoiser.network.get_parameter(f"{path}.weight").detach() for path in paths]
        self.base_hash = hash_projections(dict(zip(self._layers, weights, strict=True)))
        self._sizes = [len(weight) for weight in weights]
        self._initial = torch.cat([w.to(denoiser.device, torch.float32) for w in weights])
        self.weight = nn.Parameter(self._initial.clone())
        self._slots = {path: _Slot() for path in paths}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While the context lasts the network uses these projections; afterwards its own again."""
        network = self._denoiser.network
        own = {path: network.get_submodule(path) for path in self._slots}
        try:
            for path, slot in self._slots.items():
                _set_submodule(network, path, slot)
            yield
        finally:
            for path, module in own.items():
                _set_submodule(network, path, module)

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, context: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """The network's prediction with the trained projections, while they are installed.

        `keep` (b, n) is one where gradients of keys and values may pass, zero where they are cut.
        """
        context = context.to(self._denoiser.device, self._denoiser.dtype)
        keys_values = F.linear(context, self.weight.to(context.dtype))
        if keep is not None and keys_values.requires_grad:
            passing = keep[:, :, None].to(keys_values)
            keys_values.register_hook(lambda gradient: gradient * passing)
        for slot, part in zip(
            self._slots.values(), keys_values.split(self._sizes, -1), strict=True
        ):
            slot.value = part
        try:
            return self._denoiser.predict(noisy_latents, timesteps, context)
        finally:
            for slot in self._slots.values():
                slot.value = None

    def deltas(self) -> dict[str, DenseDelta]:
        """What was learnt so far, on the CPU in float32."""
        change = (self.weight.detach() - self._initial).cpu()
        parts = change.split(self._sizes)
        return {
            layer: DenseDelta(part.clone()) for layer, part in zip(self._layers, parts, strict=True)
        }


class _Slot(nn.Module):
    """Stands where a projection was and hands out its keys or values, computed beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def forward(self, context: Tensor) -> Tensor:
        assert self.value is not None, "the projections are computed by KeyValueProjections.predict"
        return self.value


def _set_submodule(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)
