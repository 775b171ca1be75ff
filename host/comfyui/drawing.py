"""Pictures by ComfyUI's own samplers, for what draws many of them by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ...diffusion.latents import LATENT_PIXELS

SAMPLERS: list[str] = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS: list[str] = comfy.samplers.KSampler.SCHEDULERS


@dataclass(frozen=True)
class Sampling:
    """As on KSampler; pictures are square."""

    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    resolution: int
    """In pixels"""


def sampled_pictures(
    model: Any,
    vae: Any,
    positive: Any,
    negative: Any,
    sampling: Sampling,
    seed: int,
    numbers: Sequence[int] = (0,),
) -> Tensor:
    """(b, h, w, 3) in 0..1: those of a batch of this seed that have these numbers."""
    edge = sampling.resolution // LATENT_PIXELS
    empty = torch.zeros(len(numbers), 4, edge, edge)
    latents = comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(empty, seed, list(numbers)),
        sampling.steps,
        sampling.cfg,
        sampling.sampler_name,
        sampling.scheduler,
        positive,
        negative,
        empty,
        seed=seed,
    )
    return vae.decode(latents)  # type: ignore[no-any-return]
