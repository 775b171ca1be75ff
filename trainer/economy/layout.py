"""The layout and the attention that a network computes fastest with, where it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from ...diffusion.protocols import Denoiser
from .cpu_attention import cpu_attention
from .frozen_layers import channels_last

_LARGE_FROM = 256  # pixels


@contextmanager
def fastest_for(denoiser: Denoiser, resolution: int) -> Iterator[None]:
    """While the context lasts. Measured on a CPU: neither layout nor attention helps with small
    latents, nor channels last in float32.
    """
    with ExitStack() as stack:
        if resolution >= _LARGE_FROM and denoiser.dtype != torch.float32:
            stack.enter_context(channels_last(denoiser.network))
            if denoiser.device.type == "cpu":
                stack.enter_context(cpu_attention(denoiser.network))
        yield
