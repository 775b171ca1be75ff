"""Concepts with random contents, of the right shapes for a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from custom_diffusion.concept.concept import Concept, ModifierToken
from custom_diffusion.concept.delta import DenseDelta, LowRankDelta
from custom_diffusion.concept.layers import FAMILIES, layer_from_diffusers


def made_concept(
    shapes: Mapping[str, tuple[int, int]],
    token: str = "<new1>",
    noun: str = "cat",
    family: str = "sd15",
    rank: int | None = None,
    seed: int = 0,
    scale: float = 0.02,
) -> Concept:
    """A concept that changes projections of these shapes, dense or of the rank given."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    deltas = {
        layer: DenseDelta(scale * draw(*shape))
        if rank is None
        else LowRankDelta(scale * draw(shape[0], rank), draw(rank, shape[1]))
        for layer, shape in shapes.items()
    }
    widths = {"clip_l": 768, "clip_h": 1024, "clip_g": 1280}
    embeddings = {name: 0.02 * draw(1, widths[name]) for name in FAMILIES[family].text_encoders}
    return Concept(FAMILIES[family], deltas, (ModifierToken(token, noun, embeddings),))


def concept_for(pipeline: Any, token: str, noun: str, seed: int) -> Concept:
    """Random changes of every key and value projection of a pipeline's UNet, and a word."""
    draw = torch.Generator().manual_seed(seed)
    deltas = {
        layer_from_diffusers(name): DenseDelta(0.1 * torch.randn(m.weight.shape, generator=draw))
        for name, m in pipeline.unet.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v"))
    }
    width = pipeline.text_encoder.config.hidden_size
    row = torch.randn(1, width, generator=draw)
    return Concept(FAMILIES["sd15"], deltas, (ModifierToken(token, noun, {"clip_l": row}),))
