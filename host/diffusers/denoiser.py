"""A diffusers UNet and autoencoder as the protocols of the trainer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...concept.layers import family_of_width, is_projection, layer_from_diffusers
from ...diffusion.latents import check_moments
from ...diffusion.parts import check_autoencoder, check_network, check_noise
from ...pictures.tensors import of_network
from .parts import autoencoder_of, network_of, scheduler_noise

_BLOCK = re.compile(r"\.(resnets|attentions)\.\d+$")


class DiffusersDenoiser:
    """A `UNet2DConditionModel` with its schedule; fulfils `diffusion.protocols.Denoiser`."""

    def __init__(self, unet: Any, scheduler: Any, vae: Any) -> None:
        network = network_of(unet)
        check_network(network)
        check_autoencoder(autoencoder_of(vae))
        self.family = family_of_width(network.context_width)
        self.prediction_type = check_noise(scheduler_noise(scheduler))
        self.projections: Mapping[str, str] = {
            layer_from_diffusers(path): path for path, _ in _projections(unet)
        }
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
        return of_network(images).clamp(0, 1)


class DiffusersLatentEncoder:
    """An `AutoencoderKL`; fulfils `diffusion.protocols.LatentEncoder`."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    @torch.no_grad()
    def moments(self, image_chw: Tensor) -> tuple[Tensor, Tensor]:
        pixels = image_chw[None].to(self._vae.device, self._vae.dtype)
        posterior = self._vae.encode(pixels).latent_dist
        scale = self._vae.config.scaling_factor
        mean, deviation = (
            (part[0] * scale).float().cpu() for part in (posterior.mean, posterior.std)
        )
        check_moments(mean, deviation, self._vae, "train with --precision float32")
        return mean, deviation


def _projections(unet: Any) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in unet.named_modules() if is_projection(path)]
