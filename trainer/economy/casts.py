"""Casts of weights that learn in float32, for a network that computes in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...diffusion.protocols import Denoiser
from .frozen_layers import replaced_forward


@contextmanager
def casting_each_pass(denoiser: Denoiser) -> Iterator[None]:
    """While the context lasts, a network with weights that learn computes in the denoiser's type.

    Each pass makes its casts anew: autocast keeps them for as long as it is on, and the weights
    change between passes.
    """
    network = denoiser.network
    learns = any(parameter.requires_grad for parameter in network.parameters())
    casts = torch.autocast(
        denoiser.device.type, denoiser.dtype, enabled=learns and denoiser.dtype != torch.float32
    )
    with replaced_forward(network, casts(network.forward)):
        yield
