"""What the trainer needs of a model. The hosts implement it; the loop knows nothing else."""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ..concept.layers import Family

Prediction = Literal["epsilon", "v"]


class Denoiser(Protocol):
    """A latent diffusion UNet with cross-attention, its weights frozen."""

    family: Family
    prediction: Prediction
    """What the network predicts: the noise, or the velocity."""
    alphas_cumprod: Tensor
    """The noise schedule ᾱ_t (T,), float32, on the CPU."""
    device: torch.device
    dtype: torch.dtype
    """Type that the frozen weights compute in."""
    network: nn.Module
    projections: Mapping[str, str]
    """Layer name (`concept.layers`) → path of its linear module inside `network`."""
    blocks: Sequence[str]
    """Paths of its residual and transformer blocks, which checkpointing computes twice."""

    def predict(self, noisy_latents_bchw: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """What the network predicts for latents at integer timesteps (b,), context (b, n, d)."""
        ...

    def preview(self, latents_bchw: Tensor) -> Tensor:
        """Latents → rough pictures (b, h, w, 3) in 0..1, fast enough to do while training."""
        ...


class LatentEncoder(Protocol):
    """The encoder half of the autoencoder."""

    def moments(self, image_chw: Tensor) -> tuple[Tensor, Tensor]:
        """Picture (3, H, W) in -1..1 → mean and standard deviation (4, H/8, W/8) of its latents.

        Already multiplied by the model's scaling factor; float32 on the CPU.
        """
        ...
