"""How latents and pixels go together, in every Stable Diffusion."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from ..concept.errors import IncompatibleModelError

LATENT_PIXELS = 8
"""Edge of the square of pixels that one latent stands for."""


def check_moments(mean: Tensor, deviation: Tensor, autoencoder: nn.Module, exact: str) -> None:
    """Raises IncompatibleModelError where an autoencoder made latents that are not finite.

    `exact` says how it is made to compute in float32.
    """
    if torch.isfinite(mean).all() and torch.isfinite(deviation).all():
        return
    named = chain(autoencoder.named_parameters(), autoencoder.named_buffers())
    weights = {name: weight for name, weight in named if weight.is_floating_point()}
    broken = next((name for name, weight in weights.items() if not weight.isfinite().all()), None)
    if broken is not None:
        raise IncompatibleModelError(
            f"The VAE is broken: its weight {broken} holds values that are not finite, and so do "
            f"the latents it makes of a picture. Download it again, or take another VAE of the "
            f"same kind of model."
        )
    dtype = next(iter(weights.values())).dtype if weights else mean.dtype
    name = str(dtype).removeprefix("torch.")
    remedy = "Take another VAE of the same kind of model"
    if dtype != torch.float32:
        remedy = (
            f"They grow too large for {name}: {exact}, or take a VAE that was made for half "
            f"precision (sdxl-vae-fp16-fix for SDXL)"
        )
    raise IncompatibleModelError(
        f"The VAE, which computes in {name}, made latents of a picture that are not finite "
        f"numbers; its weights and the picture are. {remedy}."
    )
