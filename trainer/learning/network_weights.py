"""Weights of the network beyond keys and values, for the methods that train more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ...concept.delta import Delta, DenseDelta
from ...diffusion.protocols import Denoiser


class NetworkWeights:
    """Parameters that learn inside the denoiser's network.

    `layers` (layer name → parameter) are put back afterwards: what they learnt is in `deltas()`.
    With `whole_network` all others but keys and values learn as well, and stay as they then are.
    `earlier` is what was learnt before, by layer; it is part of what `deltas` returns.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        earlier: Mapping[str, Delta],
        layers: Mapping[str, str],
        whole_network: bool,
    ) -> None:
        self._denoiser, self._earlier = denoiser, earlier
        network = denoiser.network
        self._layers = {layer: network.get_parameter(name) for layer, name in layers.items()}
        self._parameters = list(self._layers.values())
        if whole_network:
            apart = {f"{path}.weight" for path in denoiser.projections.values()}
            self._parameters = [p for name, p in network.named_parameters() if name not in apart]
        self._own = {layer: parameter.data for layer, parameter in self._layers.items()}
        # What is put back must not be written to; of the rest a second copy would be in the way.
        self._put_back = {id(parameter) for parameter in self._layers.values()}

    def parameters(self) -> list[nn.Parameter]:
        return self._parameters

    @contextmanager
    def learning(self) -> Iterator[None]:
        """While the context lasts they are float32 and require gradients.

        In half precision a step at a small rate would round to nothing. So the network has to
        compute with casts meanwhile.
        """
        dtypes = [parameter.dtype for parameter in self._parameters]
        try:
            for parameter in self._parameters:
                copy = id(parameter) in self._put_back
                parameter.data = parameter.data.to(torch.float32, copy=copy)
                parameter.requires_grad_(True)
            for layer, parameter in self._layers.items():
                if layer in self._earlier:
                    parameter.data += self._earlier[layer].dense().to(parameter)
            yield
        finally:
            for parameter, dtype in zip(self._parameters, dtypes, strict=True):
                parameter.requires_grad_(False)
                parameter.grad = None
                parameter.data = parameter.data.to(dtype)
            for layer, parameter in self._layers.items():
                parameter.data = self._own[layer]

    def deltas(self) -> dict[str, DenseDelta]:
        """What `layers` have learnt so far and before, on the CPU in float32; while they learn."""
        return {
            layer: DenseDelta((parameter.detach() - self._own[layer].float()).cpu())
            for layer, parameter in self._layers.items()
        }
