"""Model families and the names of their cross-attention projections: the only place that knows
them.

A layer is named by its path below `diffusion_model.` in ComfyUI (the original latent-diffusion
names), for example `input_blocks.1.1.transformer_blocks.0.attn2.to_k`. diffusers numbers the same
blocks differently; the two functions at the foot translate.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .errors import IncompatibleModelError

PROJECTION_SUFFIXES = ("attn2.to_k", "attn2.to_v")
_CROSS_ATTENTION_SUFFIXES = (*PROJECTION_SUFFIXES, "attn2.to_q", "attn2.to_out.0")

# Every Stable Diffusion with cross-attention has two residual blocks a level, and a level of the
# encoder ends with a down-sampling block that has no attention.
_RESIDUAL_BLOCKS = 2
_LEVEL = _RESIDUAL_BLOCKS + 1

# What cross-attention has at most, in SDXL: 70 transformer blocks of four matrices, 10 of width 640
# and 60 of 1280, whose keys and values read 2048.
WIDEST = 2560
"""Rows or columns of a matrix"""
MOST_LAYERS = 280
MOST_NUMBERS = sum(
    blocks * 2 * (width * 2048 + width * width) for blocks, width in ((10, 640), (60, 1280))
)
"""Of all matrices together: 546 million"""


@dataclass(frozen=True)
class Family:
    """A model family: what a concept was trained on, and what it can be applied to."""

    name: str
    title: str
    context_width: int
    text_encoders: Mapping[str, int]
    """Embedding width of each text encoder, by its name in embedding files (`clip_l`)."""
    architecture: str
    """Value of `modelspec.architecture`."""
    pooled_width: int = 0
    """Width of the one row a text that the UNet reads beside the context, with six sizes of the
    picture; 0 where it reads neither."""


FAMILIES = {
    family.name: family
    for family in (
        Family("sd15", "Stable Diffusion 1.x", 768, {"clip_l": 768}, "stable-diffusion-v1"),
        Family("sd2", "Stable Diffusion 2.x", 1024, {"clip_h": 1024}, "stable-diffusion-v2"),
        Family(
            "sdxl",
            "Stable Diffusion XL",
            2048,
            {"clip_l": 768, "clip_g": 1280},
            "stable-diffusion-xl-v1",
            pooled_width=1280,
        ),
        # Our own test bed (`miniature/`); never met in ComfyUI.
        Family("miniature", "The miniature", 128, {"clip_l": 128}, "custom-diffusion-miniature"),
    )
}


def family_of_width(context_width: int) -> Family:
    """The family whose cross-attention reads text features of this width."""
    for family in FAMILIES.values():
        if family.context_width == context_width:
            return family
    known = ", ".join(f"{f.title} ({f.context_width})" for f in FAMILIES.values())
    raise IncompatibleModelError(
        f"The model's cross-attention reads text features of width {context_width}; "
        f"known families are {known}. Load a checkpoint of one of these."
    )


def is_projection(layer: str) -> bool:
    """Whether the path names a key or value projection of a cross-attention layer."""
    return layer.endswith(PROJECTION_SUFFIXES)


def is_cross_attention(layer: str) -> bool:
    """Whether the path names any matrix of a cross-attention layer: all that a concept can hold."""
    return layer.endswith(_CROSS_ATTENTION_SUFFIXES)


def sort_layers(layers: Iterable[str]) -> list[str]:
    """Layers in one order everywhere: by path, with numbers compared as numbers."""
    return sorted(
        layers,
        key=lambda name: [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in name.split(".")],
    )


def layer_from_diffusers(path: str) -> str:
    """`down_blocks.0.attentions.1.transformer_blocks.0.…` →
    `input_blocks.2.1.transformer_blocks.0.…`.
    """
    if match := re.match(r"down_blocks\.(\d+)\.attentions\.(\d+)\.(.+)$", path):
        level, layer, rest = int(match[1]), int(match[2]), match[3]
        return f"input_blocks.{1 + level * _LEVEL + layer}.1.{rest}"
    if match := re.match(r"up_blocks\.(\d+)\.attentions\.(\d+)\.(.+)$", path):
        level, layer, rest = int(match[1]), int(match[2]), match[3]
        return f"output_blocks.{level * _LEVEL + layer}.1.{rest}"
    if match := re.match(r"mid_block\.attentions\.0\.(.+)$", path):
        return f"middle_block.1.{match[1]}"
    raise ValueError(f"{path!r} is not a transformer path of a diffusers UNet")


def layer_to_diffusers(layer: str) -> str:
    """The inverse of `layer_from_diffusers`."""
    if match := re.match(r"input_blocks\.(\d+)\.1\.(.+)$", layer):
        level, index = divmod(int(match[1]) - 1, _LEVEL)
        return f"down_blocks.{level}.attentions.{index}.{match[2]}"
    if match := re.match(r"output_blocks\.(\d+)\.1\.(.+)$", layer):
        level, index = divmod(int(match[1]), _LEVEL)
        return f"up_blocks.{level}.attentions.{index}.{match[2]}"
    if match := re.match(r"middle_block\.1\.(.+)$", layer):
        return f"mid_block.attentions.0.{match[1]}"
    raise ValueError(f"{layer!r} is not a transformer path of a latent-diffusion UNet")
