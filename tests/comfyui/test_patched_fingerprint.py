"""Fingerprints of ComfyUI's models: the same for the same file, others for other weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def test_a_file_loaded_twice_has_one_fingerprint_and_a_patch_another(
    comfy: Any, checkpoint_file: Callable[[str], Path]
) -> None:
    from custom_diffusion.host.comfyui.models.weights import patched_fingerprint

    found = []
    for _ in range(2):
        _, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint_file("sd15")))
        found.append((patched_fingerprint(clip.patcher), patched_fingerprint(vae.patcher)))
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
    key, weight = next(
        (key, weight)
        for key, weight in clip.cond_stage_model.named_parameters()
        if key.endswith("layers.0.mlp.fc1.weight")
    )
    patched = clip.clone()
    patched.add_patches({key: (torch.ones_like(weight),)}, 1.0)
    assert patched_fingerprint(patched.patcher) != found[0][0]
    assert patched_fingerprint(clip.patcher) == found[0][0]
