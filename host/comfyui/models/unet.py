"""A MODEL's UNet and a VAE's encoder as the protocols of the trainer: private copies, made outside
inference mode.

Nodes run in inference mode, and tensors made there cannot be trained through; and another prompt
may move or patch the loaded model at any time. So a job gets copies of its own, with the model's
patches in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sd1_clip
import comfy.sdxl_clip
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
from torch import Tensor, nn

from ....diffusion.latents import check_moments
from ....diffusion.parts import SIZE_WIDTH, check_autoencoder, check_network, check_noise
from ....pictures.tensors import channels_last
from .parts import autoencoder_of, network_of, noise_of
from .weights import (
    _UNET_PREFIX,
    _projections,
    cross_attention_unet,
    each_patched_weight,
    unet_family,
)

_BLOCK = re.compile(r"(input_blocks\.\d+|middle_block|output_blocks\.\d+)\.\d+$")


_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class ComfyDenoiser:
    """A private, frozen copy of a MODEL's UNet; fulfils `diffusion.protocols.Denoiser`.

    It computes in `dtype`. With `keep_float8` matrices that are loaded in 8 bits stay so; a
    training can use them as long as nothing of the network itself learns.
    """

    def __init__(self, model: Any, dtype: torch.dtype, keep_float8: bool = False) -> None:
        check_network(network_of(model))
        self.family = unet_family(cross_attention_unet(model))
        sampling = model.get_model_object("model_sampling")
        self.prediction_type = check_noise(noise_of(model))
        self.device, self.dtype = torch.device("cpu"), dtype
        colours = model.model.latent_format
        self._rgb = torch.tensor(colours.latent_rgb_factors)
        self._rgb_bias = torch.tensor(colours.latent_rgb_factors_bias or [0.0, 0.0, 0.0])
        with torch.inference_mode(False), torch.no_grad():
            self.alphas_cumprod = 1 / (1 + sampling.sigmas.float().cpu().clone().square())
            self.network: nn.Module = _empty_unet(model, dtype)
            self.projections: Mapping[str, str] = _projections(self.network)
            self.blocks: Sequence[str] = [
                path for path, _ in self.network.named_modules() if _BLOCK.match(path)
            ]
            weights = denoiser_weights(model, dtype, keep_float8)
            self.network.load_state_dict(dict(weights), assign=True)
            self.network.requires_grad_(False).train(False)

    def to(self, device: torch.device) -> None:
        """Moves the copy to the device that trains it."""
        self.network.to(device)
        self.device = device

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
            waves = timestep_embedding(sizes.flatten(), SIZE_WIDTH).view(len(sizes), -1)
            beside = torch.cat([pooled.to(waves), waves], 1).to(self.dtype)
        output = self.network(
            noisy_latents_bchw.to(self.dtype),
            timesteps.float(),
            context=context.to(self.dtype),
            y=beside,
            transformer_options={"optimized_attention_override": _pytorch_attention},
        )
        return output.float()  # type: ignore[no-any-return]

    def preview(self, latents_bchw: Tensor) -> Tensor:
        rgb, bias = self._rgb.to(latents_bchw.device), self._rgb_bias.to(latents_bchw.device)
        images = channels_last(latents_bchw.float()) @ rgb + bias
        return (images / 2 + 0.5).clamp(0, 1)


def denoiser_weights(
    model: Any, dtype: torch.dtype, keep_float8: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The weights of `ComfyDenoiser` by their names, each made when it is asked for.

    Raises IncompatibleModelError where the model has no cross-attention.
    """
    # The projections are trained from their own precision, everything else is cast.
    exact = {f"{path}.weight" for path in _projections(cross_attention_unet(model)).values()}

    def dtype_of(name: str, weight: Tensor) -> torch.dtype:
        small = keep_float8 and weight.dtype in _FLOAT8 and weight.ndim > 1
        return weight.dtype if small or name in exact else dtype

    return each_patched_weight(model, _UNET_PREFIX, dtype_of)


class ComfyLatentEncoder:
    """A VAE's encoder as `diffusion.protocols.LatentEncoder`; for the prompt thread only."""

    def __init__(self, vae: Any, scale_factor: float) -> None:
        check_autoencoder(autoencoder_of(vae))
        self._vae, self._scale = vae, scale_factor

    def moments(self, image_chw: Tensor) -> tuple[Tensor, Tensor]:
        vae, model = self._vae, self._vae.first_stage_model
        comfy.model_management.load_models_gpu([vae.patcher])
        with torch.inference_mode(False), torch.no_grad():
            moments = model.encoder(image_chw[None].to(vae.device, vae.vae_dtype))
            if hasattr(model, "quant_conv"):
                moments = model.quant_conv(moments)
            mean, log_variance = moments[0].float().cpu().chunk(2)
            deviation = (0.5 * log_variance.clamp(-30, 20)).exp()
            mean, deviation = mean * self._scale, deviation * self._scale
            check_moments(mean, deviation, model, "start ComfyUI with --fp32-vae")
            return mean, deviation


def training_dtype(device: torch.device) -> torch.dtype:
    """What frozen weights compute in: bfloat16 on a GPU that has it, else float32."""
    has_bf16 = device.type == "cuda" and comfy.model_management.should_use_bf16(device)
    return torch.bfloat16 if has_bf16 else torch.float32


class _Layers:
    """torch's own layers. ComfyUI's ask at every call whether the prompt is to be interrupted: on
    the trainer thread they would end a job for it, and keep it from the prompt that is meant.
    """

    Linear, Conv2d, Conv3d = nn.Linear, nn.Conv2d, nn.Conv3d
    GroupNorm, LayerNorm = nn.GroupNorm, nn.LayerNorm

    @classmethod
    def conv_nd(cls, dims: int, *args: Any, **kwargs: Any) -> nn.Module:
        return {2: cls.Conv2d, 3: cls.Conv3d}[dims](*args, **kwargs)


def _empty_unet(model: Any, dtype: torch.dtype) -> nn.Module:
    config = {**model.model.model_config.unet_config, "dtype": dtype}
    config.pop("disable_unet_model_creation", None)
    network: nn.Module = UNetModel(**config, device="meta", operations=_Layers)
    return network


def _pytorch_attention(_chosen: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Attention that is the same in forward and backward, whatever ComfyUI chose for sampling."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)  # type: ignore[no-any-return]
