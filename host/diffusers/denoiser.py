"""A diffusers UNet and autoencoder as the protocols of the trainer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...concept.errors import IncompatibleModelError
from ...concept.layers import family_of_width, is_projection, layer_from_diffusers
from ...diffusion.protocols import Prediction

_BLOCK = re.compile(r"\.(resnets|attentions)\.\d+$")


_PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v"}


class DiffusersDenoiser:
    """A `UNet2DConditionModel` with its schedule; fulfils `diffusion.protocols.Denoiser`."""

    def __init__(self, unet: Any, scheduler: Any, vae: Any) -> None:
        self.projections: Mapping[str, str] = {
            layer_from_diffusers(path): path for path, _ in _projections(unet)
        }
        if unet.config.get("layers_per_block", 2) != 2:
            raise IncompatibleModelError(
                f"This UNet has {unet.config.layers_per_block} layers a block; every Stable "
                f"Diffusion has 2, and concepts are named after those. Load the UNet of SD 1.x, "
                f"SD 2.x or SDXL."
            )
        if not self.projections or not isinstance(unet.config.cross_attention_dim, int):
            raise IncompatibleModelError(
                f"{type(unet).__name__} has no cross-attention with key and value projections. "
                f"Custom Diffusion needs the UNet of Stable Diffusion 1.x, 2.x or XL."
            )
        self.family = family_of_width(unet.config.cross_attention_dim)
        beside = unet.config.get("addition_embed_type")
        if beside != ("text_time" if self.family.pooled_width else None):
            raise IncompatibleModelError(
                f"This UNet reads text features of {self.family.title}, and beside them "
                f"{beside or 'nothing'}. SDXL's reads 'text_time', that of SD 1.x or 2.x nothing; "
                f"load one of these."
            )
        if scheduler.config.prediction_type not in _PREDICTIONS:
            raise IncompatibleModelError(
                f"The scheduler predicts {scheduler.config.prediction_type!r}; "
                f"epsilon or v_prediction is needed."
            )
        self.prediction = _PREDICTIONS[scheduler.config.prediction_type]
        self.alphas_cumprod = scheduler.alphas_cumprod.float().cpu()
        self.network: nn.Module = unet
        self.blocks: Sequence[str] = [
            path for path, _ in unet.named_modules() if _BLOCK.search(path)
        ]
        self.device: torch.device = unet.device
        self.dtype: torch.dtype = unet.conv_in.weight.dtype
        self._vae = vae

    def predict(
        self,
        noisy_latents_bchw: Tensor,
        timesteps: Tensor,
        context: Tensor,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        beside = None
        if self.family.pooled_width:
            assert pooled is not None and sizes is not None, "this UNet reads both"
            beside = {"text_embeds": pooled.to(self.device, self.dtype), "time_ids": sizes}
        output = self.network(
            noisy_latents_bchw.to(self.dtype),
            timesteps,
            encoder_hidden_states=context.to(self.dtype),
            added_cond_kwargs=beside,
        )
        return output.sample.float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def preview(self, latents_bchw: Tensor) -> Tensor:
        latents = latents_bchw.to(self._vae.dtype) / self._vae.config.scaling_factor
        images = self._vae.decode(latents).sample.float()
        return (images.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)  # type: ignore[no-any-return]


class DiffusersLatentEncoder:
    """An `AutoencoderKL`; fulfils `diffusion.protocols.LatentEncoder`."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    @torch.no_grad()
    def moments(self, image_chw: Tensor) -> tuple[Tensor, Tensor]:
        pixels = image_chw[None].to(self._vae.device, self._vae.dtype)
        posterior = self._vae.encode(pixels).latent_dist
        scale = self._vae.config.scaling_factor
        return (posterior.mean[0] * scale).float().cpu(), (posterior.std[0] * scale).float().cpu()


def _projections(unet: Any) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in unet.named_modules() if is_projection(path)]
