"""A regularization set drawn by the loaded model, with ComfyUI's own samplers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...concept.concept import hash_projections
from ...concept.prompts import DEFAULT_TEMPLATE
from ...trainer.config import LATENT_PIXELS
from ...trainer.data import CaptionedImage
from ...trainer.generated_set import generated_set, settings_hash
from .models import cross_attention_unet, patched_projections
from .paths import regularization_folder

SAMPLERS: list[str] = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS: list[str] = comfy.samplers.KSampler.SCHEDULERS


def draw_regularization(
    model: Any,
    clip: Any,
    vae: Any,
    *,
    class_noun: str,
    count: int,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    resolution: int,
    batch_size: int,
) -> tuple[CaptionedImage, ...]:
    """`count` pictures of the bare class, kept in a folder that is named after all they depend on.

    Interrupting keeps what is drawn; the same inputs go on from there.
    """
    cross_attention_unet(model)
    caption = DEFAULT_TEMPLATE.format(class_noun)
    settings = {
        "model": hash_projections(patched_projections(model)),
        "seed": seed,
        "steps": steps,
        "cfg": cfg,
        "sampler": sampler_name,
        "scheduler": scheduler,
        "resolution": resolution,
    }
    positive, negative = (
        clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (caption, "")
    )
    edge = resolution // LATENT_PIXELS

    def draw(numbers: Sequence[int]) -> Tensor:
        empty = torch.zeros(len(numbers), 4, edge, edge)
        latents = comfy.sample.sample(
            model,
            comfy.sample.prepare_noise(empty, seed, list(numbers)),
            steps,
            cfg,
            sampler_name,
            scheduler,
            positive,
            negative,
            empty,
            seed=seed,
        )
        return vae.decode(latents)  # type: ignore[no-any-return]

    progress = comfy.utils.ProgressBar(count)
    name = "".join(c if c.isalnum() else "-" for c in class_noun)
    folder = regularization_folder() / f"{name}-{settings_hash({**settings, 'caption': caption})}"
    return generated_set(
        folder,
        settings,
        caption,
        count,
        draw,
        batch_size=batch_size,
        on_progress=lambda done, total: progress.update_absolute(done, total),
    )
