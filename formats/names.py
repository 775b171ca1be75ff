"""Layers as other tools name them: with dots or underscores, by original or diffusers' blocks."""

from __future__ import annotations

import re

from ..concept.layers import layer_from_diffusers, layer_to_diffusers

_PREFIXES = (
    *("model_diffusion_model_", "diffusion_model_", "lora_unet_", "unet_", "lycoris_"),
    "base_model_model_",  # of PEFT, alone or behind `unet.`
)
_PLACE = re.compile(
    r"(down|up)_blocks_(\d+)_attentions_(\d+)_|(mid)_block_attentions_0_"
    r"|(input|output)_blocks_(\d+)_1_|(middle)_block_1_"
)
# The old processors of diffusers call the output `to_out`, without its number.
_REST = re.compile(r"transformer_blocks_(\d+)_attn2_(?:processor_)?to_(k|v|q|out)(?:_0)?$")


def layer_of(name: str) -> str | None:
    """Our name of a matrix of cross-attention that another tool calls `name`; None for any other.

    >>> layer_of("lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k")
    'input_blocks.2.1.transformer_blocks.0.attn2.to_k'
    """
    flat = name.replace(".", "_")
    for prefix in _PREFIXES:
        flat = flat.removeprefix(prefix)
    place = _PLACE.match(flat)
    rest = _REST.match(flat, place.end()) if place else None
    if not place or not rest:
        return None
    matrix = "out.0" if rest[2] == "out" else rest[2]
    tail = f"transformer_blocks.{int(rest[1])}.attn2.to_{matrix}"
    side, level, index, mid, old_side, block, _ = place.groups()
    if side:
        return layer_from_diffusers(f"{side}_blocks.{int(level)}.attentions.{int(index)}.{tail}")
    if old_side:
        return f"{old_side}_blocks.{int(block)}.1.{tail}"
    return (
        layer_from_diffusers(f"mid_block.attentions.0.{tail}") if mid else f"middle_block.1.{tail}"
    )


def kohya_name(layer: str, *, diffusers_blocks: bool) -> str:
    """`lora_unet_…`, with the blocks that LoRA files of its family name: the original ones for
    SDXL, diffusers' for the others.
    """
    path = layer_to_diffusers(layer) if diffusers_blocks else layer
    return "lora_unet_" + path.replace(".", "_")


def hugging_face_name(layer: str) -> str:
    """Of diffusers' Custom Diffusion processors, without `.weight`."""
    block, _, matrix = layer_to_diffusers(layer).rpartition(".attn2.")
    name, _, index = matrix.partition(".")
    return f"{block}.attn2.processor.{name}_custom_diffusion" + (f".{index}" if index else "")


def layer_of_hugging_face(name: str) -> str | None:
    """The inverse of `hugging_face_name`."""
    return layer_of(name.replace("_custom_diffusion", "")) if "_custom_diffusion" in name else None
