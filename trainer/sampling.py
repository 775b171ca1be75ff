"""A small sampler for previews: a host's own must not run beside the host's prompts."""

from collections.abc import Callable

import torch
from torch import Tensor

from .objective import denoised
from .protocols import Prediction

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(latents, timesteps, context) → the network's output"""


@torch.no_grad()
def ddim_sample(
    predict: Predict,
    noise_bchw: Tensor,
    context: Tensor,
    empty_context: Tensor,
    alphas_cumprod: Tensor,
    prediction: Prediction,
    steps: int = 20,
    guidance: float = 6.0,
) -> Tensor:
    """Latents (b, 4, h, w) by DDIM without added noise (Song et al. 2021, Eq. 12), with guidance.

    `context` and `empty_context` are (b, n, d), for the prompt and for the empty prompt.
    """
    latents = noise_bchw
    both = torch.cat([context, empty_context])
    schedule = torch.linspace(len(alphas_cumprod) - 1, 0, steps + 1).long()
    for now, following in zip(schedule[:-1], schedule[1:], strict=True):
        timesteps = now.expand(2 * len(latents)).to(latents.device)
        output = predict(torch.cat([latents, latents]), timesteps, both).to(latents)
        guided, unguided = output.chunk(2)
        output = unguided + guidance * (guided - unguided)
        clean, noise = denoised(
            latents, output, timesteps[: len(latents)], alphas_cumprod, prediction
        )
        alpha = alphas_cumprod[following].to(latents)
        latents = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    return latents
