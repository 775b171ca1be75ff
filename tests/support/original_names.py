"""Pipelines of diffusers written as one checkpoint under latent diffusion's names, by a table of
our own: what the pack makes of such a file can be compared with the pipeline it came from.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from . import tiny_models as tiny

_RESNET = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"},
    **{"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"},
}
_UNET = {
    **{"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"},
    **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
    **{"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"},
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    **{"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"},
    **{"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"},
}


def small_pipeline(family: str, prediction: str = "epsilon") -> Any:
    """Random, and of the true kind in all that a checkpoint does not say: norms of 32 groups, heads
    64 wide or, in SD 1.x, 8 of them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        common = {"unet": _unet(family), "vae": _vae(family)}
        common["scheduler"] = tiny.sd_scheduler(prediction)
        if family == "sdxl":
            return StableDiffusionXLPipeline(
                **common,
                text_encoder=tiny.tiny_text_model(),
                text_encoder_2=tiny.tiny_projected_text_model(layers=3),
                tokenizer=tiny.clip_tokenizer(),
                tokenizer_2=tiny.tokenizer_padding_with_zero(),
                add_watermarker=False,
            )
        sd2 = family == "sd2"
        return StableDiffusionPipeline(
            **common,
            text_encoder=_sd2_text() if sd2 else tiny.tiny_text_model(),
            tokenizer=tiny.tokenizer_padding_with_zero() if sd2 else tiny.clip_tokenizer(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def checkpoint_tensors(pipeline: Any, family: str) -> dict[str, Tensor]:
    """Everything in the pipeline, under the names of a checkpoint."""
    tensors = {}
    for name, weight in pipeline.unet.state_dict().items():
        tensors[f"model.diffusion_model.{_unet_name(name, pipeline.unet)}"] = weight
    levels = len(pipeline.vae.config.block_out_channels)
    for name, weight in pipeline.vae.state_dict().items():
        original = _vae_name(name, levels)
        is_matrix = ".attn_1." in original and weight.ndim == 2
        tensors[f"first_stage_model.{original}"] = weight[..., None, None] if is_matrix else weight
    if family == "sd2":
        tensors |= _open_clip(pipeline.text_encoder, "cond_stage_model.model.", unread=True)
        return tensors
    first = "conditioner.embedders.0" if family == "sdxl" else "cond_stage_model"
    for name, weight in _text_state(pipeline.text_encoder).items():
        tensors[f"{first}.transformer.text_model.{name}"] = weight
    if family == "sdxl":
        tensors |= _open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    return tensors


def write_checkpoint(
    file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> Path:
    save_file(
        {name: weight.contiguous().clone() for name, weight in tensors.items()}, file, metadata
    )
    return file


def _unet(family: str) -> UNet2DConditionModel:
    own: dict[str, Any] = {
        "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
        "sd2": {
            **{"cross_attention_dim": 1024, "attention_head_dim": [1, 2]},
            "use_linear_projection": True,
        },
        "sdxl": {
            **{"cross_attention_dim": 2048, "attention_head_dim": [1, 2]},
            "use_linear_projection": True,
            "transformer_layers_per_block": [1, 2],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    }[family]
    down = ("DownBlock2D", "CrossAttnDownBlock2D")
    if family != "sdxl":
        down = down[::-1]
    return UNet2DConditionModel(
        block_out_channels=(64, 128),
        layers_per_block=2,
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        **own,
    )


def _vae(family: str) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 64),
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    ).eval()


def _sd2_text() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=tiny.VOCABULARY_SIZE,
        hidden_size=1024,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=16,
        hidden_act="gelu",
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return CLIPTextModel(config).eval()


def _unet_name(name: str, unet: UNet2DConditionModel) -> str:
    for own, original in _UNET.items():
        if name.startswith(f"{own}."):
            return f"{original}{name.removeprefix(own)}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        if match[1] == "attentions":
            return f"middle_block.1.{match[3]}"
        return f"middle_block.{2 * int(match[2])}.{_renamed(match[3], _RESNET)}"
    match = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name)
    assert match, name
    way, level, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    side, first = ("input_blocks", 1) if way == "down" else ("output_blocks", 0)
    if kind == "resnets":
        return f"{side}.{first + 3 * level + index}.0.{_renamed(rest, _RESNET)}"
    if kind == "attentions":
        return f"{side}.{first + 3 * level + index}.1.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{3 * (level + 1)}.0.op.{rest.removeprefix('conv.')}"
    beside = 2 if "CrossAttn" in unet.config.up_block_types[level] else 1
    return f"output_blocks.{3 * level + 2}.{beside}.{rest}"


def _vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if match := re.match(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.+)", name):
        return f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
    if match := re.match(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)", name):
        return f"{match[1]}.mid.attn_1.{_renamed(match[2], _VAE_ATTENTION)}"
    if match := re.match(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name):
        half, level, kind, index, rest = match.groups()
        way, number = ("down", int(level)) if half == "encoder" else ("up", levels - 1 - int(level))
        inner = f"block.{index}" if kind == "resnets" else f"{way}sample"
        return f"{half}.{way}.{number}.{inner}.{rest}"
    return name


def _open_clip(model: Any, prefix: str, unread: bool = False) -> dict[str, Tensor]:
    """`unread`: with a projection and a last layer that SD 2.x leaves out."""
    state = _text_state(model)
    layers = model.config.num_hidden_layers
    tensors = {_OPEN_CLIP[name]: state[name] for name in _OPEN_CLIP}
    for layer in range(layers):
        own, original = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for name, other in _OPEN_CLIP_LAYER.items():
            for kind in ("weight", "bias"):
                tensors[f"{original}{other}.{kind}"] = state[f"{own}{name}.{kind}"]
        for kind in ("weight", "bias"):
            parts = [state[f"{own}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            tensors[f"{original}attn.in_proj_{kind}"] = torch.cat(parts)
    if hasattr(model, "text_projection"):
        tensors["text_projection"] = model.text_projection.weight.T
    if unread:
        last = f"transformer.resblocks.{layers - 1}."
        for name in [name for name in tensors if name.startswith(last)]:
            behind = name.replace(f".{layers - 1}.", f".{layers}.")
            tensors[behind] = torch.randn(tensors[name].shape)
        tensors["text_projection"] = torch.randn(1024, 1024)
    tensors["logit_scale"] = torch.tensor(4.6)
    return {f"{prefix}{name}": weight for name, weight in tensors.items()}


def _text_state(model: Any) -> dict[str, Tensor]:
    inner = getattr(model, "text_model", model)
    return {
        name: weight
        for name, weight in inner.state_dict().items()
        if not name.startswith("text_projection")
    }


def _renamed(rest: str, table: dict[str, str]) -> str:
    own = next(own for own in table if rest.startswith(f"{own}."))
    return f"{table[own]}{rest.removeprefix(own)}"
