"""A small sampler for previews: a host's own must not run beside the host's prompts."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..concept.text import TextFeatures
from .latents import LATENT_PIXELS
from .noise import denoised
from .protocols import PredictionType, whole_picture

Predict = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor]
"""(latents, timesteps, context, pooled, sizes) → the network's output"""


@torch.no_grad()
def ddim_sample(
    predict: Predict,
    noise_bchw: Tensor,
    text: TextFeatures,
    nothing: TextFeatures,
    alphas_cumprod: Tensor,
    prediction_type: PredictionType,
    steps: int = 20,
    guidance: float = 6.0,
) -> Tensor:
    """Latents (b, 4, h, w) by DDIM without added noise (Song et al. 2021, Eq. 12), with guidance.

    `text` and `nothing` are the features of b prompts, and as many times of the empty prompt.
    """
    latents = noise_bchw
    context = torch.cat([text.context, nothing.context])
    pooled = None
    if text.pooled is not None and nothing.pooled is not None:
        pooled = torch.cat([text.pooled, nothing.pooled])
    edge = LATENT_PIXELS * latents.shape[-1]
    sizes = torch.tensor([whole_picture(edge)] * len(context), device=latents.device)
    schedule = torch.linspace(len(alphas_cumprod) - 1, 0, steps + 1).long()
    for now, following in zip(schedule[:-1], schedule[1:], strict=True):
        timesteps = now.expand(2 * len(latents)).to(latents.device)
        noisy = torch.cat([latents, latents])
        output = predict(noisy, timesteps, context, pooled, sizes).to(latents)
        guided, unguided = output.chunk(2)
        output = unguided + guidance * (guided - unguided)
        clean, noise = denoised(
            latents, output, timesteps[: len(latents)], alphas_cumprod, prediction_type
        )
        alpha = alphas_cumprod[following].to(latents)
        latents = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    return latents
