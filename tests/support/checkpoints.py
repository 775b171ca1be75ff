"""Random checkpoints of true shape, so that tests need no pretrained weights.

Every file uses the original single-file naming that ComfyUI's CheckpointLoaderSimple reads. Widths,
names and data types are those of the real models; only the number of UNet levels is lower, and the
lower level of SD 1.x no wider than the upper one, which keeps a file small and a sampling step
short. Weights are drawn from a seeded generator and scaled
by fan-in, so activations stay of order one and no output is constant.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

Shapes = Iterator[tuple[str, tuple[int, ...]]]
VaeKind = Literal["kl", "tiny"]

UNET_PREFIX = "model.diffusion_model."
V_PREDICTION_KEY = f"{UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"

_MODEL_CHANNELS = 320
_TIME_CHANNELS = 4 * _MODEL_CHANNELS
_CHANNEL_MULT = (1, 2, 4, 4)
_NARROW = (1, 1)
_ATTENTION_LEVELS = 3
_VAE_WIDTHS = (128, 256, 512, 512)


def write_sd15(
    path: Path,
    *,
    channel_mult: tuple[int, ...] = _NARROW,
    res_blocks: int = 2,
    vae: VaeKind = "kl",
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write an SD 1.x checkpoint; ``channel_mult=(1, 2, 4, 4)`` gives SD 1.5 exactly."""
    tensors = _draw(
        [
            *_unet(channel_mult, res_blocks, context_dim=768, linear_projection=False),
            *_clip_l("cond_stage_model.transformer.text_model."),
            *_vae(vae),
        ],
        seed,
        dtype,
    )
    return _save(path, tensors)


def write_sd15_scaled_float8(path: Path) -> Path:
    """Write the same with the matrices of the transformers in 8 bits, each with its scale."""
    whole = load_file(write_sd15(path))
    tensors = {f"{UNET_PREFIX}scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, weight in whole.items():
        tensors[name] = weight
        if name.startswith(UNET_PREFIX) and "transformer_blocks" in name and weight.ndim == 2:
            scale = weight.float().abs().max() / torch.finfo(torch.float8_e4m3fn).max
            tensors[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{name.removesuffix('weight')}scale_weight"] = scale
    return _save(path, tensors)


def write_sd2(
    path: Path,
    *,
    v_prediction: bool,
    levels: int = 2,
    res_blocks: int = 2,
    vae: VaeKind = "kl",
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write an SD 2.x checkpoint; ``levels=4`` gives the exact shapes of SD 2.1.

    ComfyUI takes an SD 2.x model for a v-prediction one when the bias named by
    ``V_PREDICTION_KEY`` has a standard deviation above 0.09. A UNet with fewer levels has no such
    block; there the bias is an extra entry, which the loader inspects and then ignores.
    """
    tensors = _draw(
        [
            *_unet(_CHANNEL_MULT[:levels], res_blocks, context_dim=1024, linear_projection=True),
            *_open_clip_h("cond_stage_model.model."),
            *_vae(vae),
        ],
        seed,
        dtype,
    )
    if v_prediction:
        signs = torch.tensor([1.0, -1.0]).repeat(_MODEL_CHANNELS // 2)
        tensors[V_PREDICTION_KEY] = (0.2 * signs).to(dtype)
    return _save(path, tensors)


def write_dit(path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float16) -> Path:
    """Write an SD3-type transformer of one block: a model without any cross-attention layer.

    The file holds no text encoder and no VAE; the checkpoint loader returns CLIP as None.
    """
    return _save(path, _draw([*_mmdit()], seed, dtype))


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write through a temporary name, so that an interrupted run leaves no half checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(path)
    return path


def _draw(
    shapes: list[tuple[str, tuple[int, ...]]], seed: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: _initial(name, shape, generator).to(dtype) for name, shape in shapes}


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith(("bias", "shift")):
        return torch.zeros(shape)
    if len(shape) < 2:
        return torch.ones(shape)
    is_table = "embedding" in name or "pos_embed" in name
    deviation = 0.02 if is_table else 1.0 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).normal_(0.0, deviation, generator=generator)


def _linear(name: str, fan_in: int, fan_out: int, *, bias: bool = True) -> Shapes:
    yield f"{name}.weight", (fan_out, fan_in)
    if bias:
        yield f"{name}.bias", (fan_out,)


def _conv(name: str, fan_in: int, fan_out: int, kernel: int = 3, *, bias: bool = True) -> Shapes:
    yield f"{name}.weight", (fan_out, fan_in, kernel, kernel)
    if bias:
        yield f"{name}.bias", (fan_out,)


def _norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _unet(
    mults: tuple[int, ...], res_blocks: int, *, context_dim: int, linear_projection: bool
) -> Shapes:
    prefix = UNET_PREFIX
    channels = _MODEL_CHANNELS

    def block(name: str, fan_in: int, fan_out: int, *, attention: bool) -> Shapes:
        yield from _res_block(f"{name}.0.", fan_in, fan_out)
        if attention:
            yield from _transformer(f"{name}.1.", fan_out, context_dim, linear_projection)

    yield from _linear(f"{prefix}time_embed.0", channels, _TIME_CHANNELS)
    yield from _linear(f"{prefix}time_embed.2", _TIME_CHANNELS, _TIME_CHANNELS)
    yield from _conv(f"{prefix}input_blocks.0.0", 4, channels)
    skips = [channels]
    for level, mult in enumerate(mults):
        width = mult * _MODEL_CHANNELS
        for _ in range(res_blocks):
            name = f"{prefix}input_blocks.{len(skips)}"
            yield from block(name, channels, width, attention=level < _ATTENTION_LEVELS)
            channels = width
            skips.append(channels)
        if level + 1 < len(mults):
            yield from _conv(f"{prefix}input_blocks.{len(skips)}.0.op", channels, channels)
            skips.append(channels)

    yield from block(f"{prefix}middle_block", channels, channels, attention=True)
    yield from _res_block(f"{prefix}middle_block.2.", channels, channels)

    index = 0
    for level, mult in reversed(list(enumerate(mults))):
        width = mult * _MODEL_CHANNELS
        attention = level < _ATTENTION_LEVELS
        for position in range(res_blocks + 1):
            name = f"{prefix}output_blocks.{index}"
            yield from block(name, channels + skips.pop(), width, attention=attention)
            channels = width
            if level and position == res_blocks:
                yield from _conv(f"{name}.{1 + attention}.conv", channels, channels)
            index += 1

    yield from _norm(f"{prefix}out.0", channels)
    yield from _conv(f"{prefix}out.2", channels, 4)


def _res_block(prefix: str, fan_in: int, fan_out: int) -> Shapes:
    yield from _norm(f"{prefix}in_layers.0", fan_in)
    yield from _conv(f"{prefix}in_layers.2", fan_in, fan_out)
    yield from _linear(f"{prefix}emb_layers.1", _TIME_CHANNELS, fan_out)
    yield from _norm(f"{prefix}out_layers.0", fan_out)
    yield from _conv(f"{prefix}out_layers.3", fan_out, fan_out)
    if fan_in != fan_out:
        yield from _conv(f"{prefix}skip_connection", fan_in, fan_out, kernel=1)


def _transformer(prefix: str, width: int, context_dim: int, linear_projection: bool) -> Shapes:
    def projection(name: str) -> Shapes:
        return _linear(name, width, width) if linear_projection else _conv(name, width, width, 1)

    yield from _norm(f"{prefix}norm", width)
    yield from projection(f"{prefix}proj_in")
    block = f"{prefix}transformer_blocks.0."
    for attention, key_width in (("attn1", width), ("attn2", context_dim)):
        yield from _linear(f"{block}{attention}.to_q", width, width, bias=False)
        yield from _linear(f"{block}{attention}.to_k", key_width, width, bias=False)
        yield from _linear(f"{block}{attention}.to_v", key_width, width, bias=False)
        yield from _linear(f"{block}{attention}.to_out.0", width, width)
    yield from _linear(f"{block}ff.net.0.proj", width, 8 * width)
    yield from _linear(f"{block}ff.net.2", 4 * width, width)
    for name in ("norm1", "norm2", "norm3"):
        yield from _norm(f"{block}{name}", width)
    yield from projection(f"{prefix}proj_out")


def _clip_l(prefix: str) -> Shapes:
    width = 768
    yield f"{prefix}embeddings.token_embedding.weight", (49408, width)
    yield f"{prefix}embeddings.position_embedding.weight", (77, width)
    for layer in range(12):
        name = f"{prefix}encoder.layers.{layer}."
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{name}self_attn.{projection}", width, width)
        yield from _linear(f"{name}mlp.fc1", width, 4 * width)
        yield from _linear(f"{name}mlp.fc2", 4 * width, width)
        yield from _norm(f"{name}layer_norm1", width)
        yield from _norm(f"{name}layer_norm2", width)
    yield from _norm(f"{prefix}final_layer_norm", width)


def _open_clip_h(prefix: str) -> Shapes:
    width = 1024
    yield f"{prefix}token_embedding.weight", (49408, width)
    yield f"{prefix}positional_embedding", (77, width)
    yield f"{prefix}text_projection", (width, width)
    for layer in range(24):
        name = f"{prefix}transformer.resblocks.{layer}."
        yield f"{name}attn.in_proj_weight", (3 * width, width)
        yield f"{name}attn.in_proj_bias", (3 * width,)
        yield from _linear(f"{name}attn.out_proj", width, width)
        yield from _linear(f"{name}mlp.c_fc", width, 4 * width)
        yield from _linear(f"{name}mlp.c_proj", 4 * width, width)
        yield from _norm(f"{name}ln_1", width)
        yield from _norm(f"{name}ln_2", width)
    yield from _norm(f"{prefix}ln_final", width)


def _vae(kind: VaeKind) -> Shapes:
    prefix = "first_stage_model."
    return _kl_vae(prefix) if kind == "kl" else _tiny_vae(prefix)


def _kl_vae(prefix: str) -> Shapes:
    """Yield the true SD autoencoder: the oldest supported ComfyUI accepts no narrower one."""
    widths = _VAE_WIDTHS
    yield from _conv(f"{prefix}encoder.conv_in", 3, widths[0])
    channels = widths[0]
    for level, width in enumerate(widths):
        for position in range(2):
            name = f"{prefix}encoder.down.{level}.block.{position}."
            yield from _vae_block(name, channels, width)
            channels = width
        if level + 1 < len(widths):
            yield from _conv(f"{prefix}encoder.down.{level}.downsample.conv", channels, channels)
    yield from _vae_middle(f"{prefix}encoder.mid.", channels)
    yield from _norm(f"{prefix}encoder.norm_out", channels)
    yield from _conv(f"{prefix}encoder.conv_out", channels, 8)
    yield from _conv(f"{prefix}quant_conv", 8, 8, 1)

    yield from _conv(f"{prefix}post_quant_conv", 4, 4, 1)
    yield from _conv(f"{prefix}decoder.conv_in", 4, channels)
    yield from _vae_middle(f"{prefix}decoder.mid.", channels)
    for level, width in reversed(list(enumerate(widths))):
        for position in range(3):
            name = f"{prefix}decoder.up.{level}.block.{position}."
            yield from _vae_block(name, channels, width)
            channels = width
        if level:
            yield from _conv(f"{prefix}decoder.up.{level}.upsample.conv", channels, channels)
    yield from _norm(f"{prefix}decoder.norm_out", channels)
    yield from _conv(f"{prefix}decoder.conv_out", channels, 3)


def _vae_block(prefix: str, fan_in: int, fan_out: int) -> Shapes:
    yield from _norm(f"{prefix}norm1", fan_in)
    yield from _conv(f"{prefix}conv1", fan_in, fan_out)
    yield from _norm(f"{prefix}norm2", fan_out)
    yield from _conv(f"{prefix}conv2", fan_out, fan_out)
    if fan_in != fan_out:
        yield from _conv(f"{prefix}nin_shortcut", fan_in, fan_out, 1)


def _vae_middle(prefix: str, width: int) -> Shapes:
    yield from _vae_block(f"{prefix}block_1.", width, width)
    yield from _norm(f"{prefix}attn_1.norm", width)
    for projection in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{prefix}attn_1.{projection}", width, width, 1)
    yield from _vae_block(f"{prefix}block_2.", width, width)


def _tiny_vae(prefix: str) -> Shapes:
    """Yield the small distilled autoencoder (TAESD), which ComfyUI takes in place of the KL one."""
    width = 64
    encoder, decoder = f"{prefix}taesd_encoder.", f"{prefix}taesd_decoder."
    yield from _conv(f"{encoder}0", 3, width)
    for index in range(1, 14):
        if index in (2, 6, 10):
            yield from _conv(f"{encoder}{index}", width, width, bias=False)
        else:
            yield from _tiny_block(f"{encoder}{index}.", width)
    yield from _conv(f"{encoder}14", width, 4)

    yield from _conv(f"{decoder}1", 4, width)
    for index in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18):
        yield from _tiny_block(f"{decoder}{index}.", width)
    for index in (7, 12, 17):
        yield from _conv(f"{decoder}{index}", width, width, bias=False)
    yield from _conv(f"{decoder}19", width, 3)
    yield f"{prefix}vae_scale", ()
    yield f"{prefix}vae_shift", ()


def _tiny_block(prefix: str, width: int) -> Shapes:
    for index in (0, 2, 4):
        yield from _conv(f"{prefix}conv.{index}", width, width)


def _mmdit() -> Shapes:
    """Yield an SD3 transformer of depth one; its width is always 64 times its depth."""
    prefix, width = UNET_PREFIX, 64
    yield f"{prefix}pos_embed", (1, 192 * 192, width)
    yield from _conv(f"{prefix}x_embedder.proj", 16, width, 2)
    yield from _linear(f"{prefix}t_embedder.mlp.0", 256, width)
    yield from _linear(f"{prefix}t_embedder.mlp.2", width, width)
    yield from _linear(f"{prefix}y_embedder.mlp.0", 2048, width)
    yield from _linear(f"{prefix}y_embedder.mlp.2", width, width)
    yield from _linear(f"{prefix}context_embedder", 4096, width)
    block = f"{prefix}joint_blocks.0."
    yield from _linear(f"{block}context_block.attn.qkv", width, 3 * width)
    yield from _linear(f"{block}context_block.adaLN_modulation.1", width, 2 * width)
    yield from _linear(f"{block}x_block.attn.qkv", width, 3 * width)
    yield from _linear(f"{block}x_block.attn.proj", width, width)
    yield from _linear(f"{block}x_block.mlp.fc1", width, 4 * width)
    yield from _linear(f"{block}x_block.mlp.fc2", 4 * width, width)
    yield from _linear(f"{block}x_block.adaLN_modulation.1", width, 6 * width)
    yield from _linear(f"{prefix}final_layer.linear", width, 2 * 2 * 16)
    yield from _linear(f"{prefix}final_layer.adaLN_modulation.1", width, 2 * width)
