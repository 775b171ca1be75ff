"""Models of true size with random weights: speed does not depend on what a model has learnt."""

from typing import Any

import torch
from custom_diffusion.host.clip.text_encoder import ClipTextEncoder
from custom_diffusion.host.open_clip.vocabulary import clip_tokenizer
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

VOCABULARY = 49408
HEAD_WIDTH = 64
"""Of every CLIP text model."""


def random_text_encoder(
    width: int = 768, layers: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32
) -> ClipTextEncoder:
    """`random_text_model` as the pack sees it, with CLIP's vocabulary; its products in `dtype`."""
    tokenizer = clip_tokenizer()
    name = "clip_l" if width == 768 else "clip_h"
    model = random_text_model(width, layers, seed)
    encoder = ClipTextEncoder(name, model, tokenizer, pad_id=tokenizer.pad_token_id)
    encoder.to(torch.device("cpu"), dtype)
    return encoder


def random_text_model(width: int = 768, layers: int = 12, seed: int = 0) -> CLIPTextModel:
    """CLIP's text model of this width, CLIP-L when not said otherwise.

    Weights are scaled by fan-in and norms are not trivial, so that words mix as in a taught model:
    with the usual start of training a word's features would hardly depend on the words before it.
    """
    torch.manual_seed(seed)
    model = CLIPTextModel(text_config(width, layers)).eval().requires_grad_(False)
    for path, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.normal_(0, 1 if "embedding" in path else weight.shape[1] ** -0.5)
        elif "norm" in path:
            weight.add_(0.1 * torch.randn(weight.shape))
    return model


def text_config(width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        hidden_act="quick_gelu" if width == 768 else "gelu",
    )


def random_unet(dtype: torch.dtype, seed: int = 0) -> Any:
    """The UNet of SD 1.5, built in `dtype` at once: a float32 copy would be the peak of memory."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    finally:
        torch.set_default_dtype(before)
    return unet.eval().requires_grad_(False)


def random_vae(seed: int = 0) -> Any:
    """The autoencoder of every Stable Diffusion, float32."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    return vae.eval().requires_grad_(False)
