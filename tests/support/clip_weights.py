"""Random weights of the text half of an open_clip model, as a file in open_clip's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import torch
from custom_diffusion.host.open_clip.text import MODEL
from safetensors.torch import save_file


def write_text_half(path: Path) -> Path:
    """Of the default model, in half precision: 130 MB."""
    config: dict[str, Any] = open_clip.get_model_config(MODEL)
    config["vision_cfg"] = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**config)
    text = {k: v.half() for k, v in model.state_dict().items() if not k.startswith("visual.")}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(text, path)
    return path
