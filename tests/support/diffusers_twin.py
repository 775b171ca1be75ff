"""The diffusers pipeline with the weights of a test checkpoint, made by diffusers' own converters.

They are the independent judge of the pack's layer names and of its two hosts.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

_CLIP_L = "cond_stage_model.transformer."


def diffusers_twin(checkpoint: Path, tokenizer: Any, *, v_prediction: bool = False) -> Any:
    """A float32 pipeline with the weights of a two-level SD 1.x or 2.x checkpoint."""
    weights = {name: tensor.float() for name, tensor in load_file(checkpoint).items()}
    sd2 = not any(name.startswith(_CLIP_L) for name in weights)
    return StableDiffusionPipeline(
        vae=_vae(weights),
        text_encoder=_open_clip(weights) if sd2 else _clip(weights),
        tokenizer=tokenizer,
        unet=_unet(weights, sd2),
        scheduler=DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction" if v_prediction else "epsilon",
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _unet(weights: dict[str, torch.Tensor], sd2: bool) -> Any:
    lower = len(weights["model.diffusion_model.middle_block.0.out_layers.0.weight"])
    unet = UNet2DConditionModel(
        block_out_channels=(320, lower),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=2,
        cross_attention_dim=1024 if sd2 else 768,
        attention_head_dim=(5, 10) if sd2 else 8,
        use_linear_projection=sd2,
    )
    unet.load_state_dict(convert_ldm_unet_checkpoint(dict(weights), dict(unet.config)))
    return unet.eval()


def _vae(weights: dict[str, torch.Tensor]) -> Any:
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    vae.load_state_dict(convert_ldm_vae_checkpoint(dict(weights), dict(vae.config)))
    return vae.eval()


def _clip(weights: dict[str, torch.Tensor]) -> Any:
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    text = {k.removeprefix(_CLIP_L): v for k, v in weights.items() if _CLIP_L in k}
    return _load_text(CLIPTextModel(config), text)


def _open_clip(weights: dict[str, torch.Tensor]) -> Any:
    # diffusers' SD 2 has 23 layers: the last but one of OpenCLIP's 24 is what the UNet reads.
    config = CLIPTextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=23,
        hidden_act="gelu",
    )
    model = CLIPTextModel(config)
    return _load_text(model, convert_open_clip_checkpoint(model, dict(weights)))


def _load_text(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    inner = getattr(model, "text_model", model)
    weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    known = inner.state_dict().keys()
    inner.load_state_dict({name: t for name, t in weights.items() if name in known}, strict=True)
    return model.eval()
