"""Small feature models with random weights, in folders as their own libraries write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from support.tiny_models import TINY_CLIP, clip_tokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

_LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def write_clip(folder: Path, edge: int = 32) -> CLIPModel:
    """Of transformers, with its tokenizer."""
    text = {**_LAYERS, "num_attention_heads": 2, "vocab_size": 49408, "eos_token_id": 49407}
    vision = {**_LAYERS, "num_attention_heads": 2, "image_size": edge, "patch_size": 8}
    model = _drawn(
        lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    )
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return model


def clip_processor(edge: int = 32) -> CLIPImageProcessor:
    """How transformers prepares pictures for it."""
    return CLIPImageProcessor(
        size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}
    )


def write_dinov2(folder: Path) -> Dinov2Model:
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = _drawn(lambda: Dinov2Model(Dinov2Config(**settings, image_size=28, patch_size=14)))
    model.save_pretrained(folder)
    return model


def write_open_clip(folder: Path) -> open_clip.CLIP:
    folder.mkdir(parents=True, exist_ok=True)
    model = _drawn(lambda: open_clip.CLIP(**TINY_CLIP))
    weights = {name: t.detach().clone().contiguous() for name, t in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    config = {"model_cfg": TINY_CLIP, "preprocess_cfg": {"size": 32}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return model


def _drawn(make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()
