"""What sampling and training need of a model. The hosts implement it; no more of it is known."""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ..concept.layers import Family

PredictionType = Literal["epsilon", "v"]
Sizes = tuple[int, int, int, int, int, int]
"""Where a training picture comes from, in pixels: height and width of the original; top and left of
the crop, after it was resized; height and width of what is seen."""


def whole_picture(edge: int) -> Sizes:
    """Of a square picture that was neither resized nor cropped."""
    return edge, edge, 0, 0, edge, edge


class Denoiser(Protocol):
    """A latent diffusion UNet with cross-attention, its weights frozen."""

    family: Family
    prediction_type: PredictionType
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
    """Paths of its residual and transformer blocks, which gradient checkpointing computes twice."""

    def predict(
        self,
        noisy_latents_bchw: Tensor,
        timesteps: Tensor,
        context: Tensor,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """What the network predicts for latents at integer timesteps (b,), context (b, n, d).

        Families with a `pooled_width` w read pooled text features (b, w) and `Sizes` (b, 6) too;
        others leave them aside.
        """
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
