"""Pictures by ComfyUI's own samplers, as KSampler draws them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ...concept.errors import IncompatibleModelError
from ...diffusion.latents import LATENT_PIXELS
from .models.weights import patched_fingerprint

SAMPLERS: list[str] = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS: list[str] = comfy.samplers.KSampler.SCHEDULERS


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn, as on KSampler."""

    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    resolution: int

    def empty(self, count: int) -> Tensor:
        edge = self.resolution // LATENT_PIXELS
        return torch.zeros(count, 4, edge, edge)

    def draw(
        self, model: Any, vae: Any, positive: Any, negative: Any, noise: Tensor, seed: int
    ) -> Tensor:
        """Pictures (b, h, w, 3) in 0..1 of one prompt from noise (b, 4, h / 8, w / 8)."""
        latents = comfy.sample.sample(
            model,
            noise,
            self.steps,
            self.cfg,
            self.sampler_name,
            self.scheduler,
            positive,
            negative,
            self.empty(len(noise)),
            seed=seed,
        )
        return vae.decode(latents)  # type: ignore[no-any-return]


def conditioning(clip: Any, text: str) -> Any:
    """A prompt as a sampler takes it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def drawing_models(model: Any, clip: Any, vae: Any) -> Mapping[str, str]:
    """Fingerprints of all that a picture depends on besides its prompt and the sampling."""
    if clip is None or vae is None:
        raise IncompatibleModelError(
            f"No {'CLIP' if clip is None else 'VAE'} was given: the checkpoint has none. Connect "
            f"that of another loader."
        )
    return {
        "model": patched_fingerprint(model),
        "clip": f"{patched_fingerprint(clip.patcher)}, layer {clip.layer_idx}",
        "vae": patched_fingerprint(vae.patcher),
    }
