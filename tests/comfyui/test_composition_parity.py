"""Regions, given or found, and isolation draw the same latents in ComfyUI and in diffusers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.composition.masks import box
from custom_diffusion.composition.regions import Region
from custom_diffusion.composition.routing import Route
from custom_diffusion.concept.concept import Concept
from custom_diffusion.host.diffusers.sampling import sample as sample_in_diffusers
from support.diffusers_twin import diffusers_twin
from support.made_concepts import made_concept
from support.routed_samples import encode
from torch import Tensor

PROMPT = "a <new1> cat and a <new2> dog"
STEPS, GUIDANCE, EDGE = 3, 3.0, 8
LIMIT = 1e-4


@pytest.fixture(scope="module")
def pipeline(load: Any, checkpoint_file: Callable[[str], Path]) -> Any:
    tokenizer = load("sd15").clip.tokenizer.clip_l.tokenizer
    pipeline = diffusers_twin(checkpoint_file("sd15"), tokenizer)
    pipeline.tokenizer.pad_token = "<|endoftext|>"
    return pipeline


@pytest.fixture
def concepts(shapes: Any) -> list[Concept]:
    made = [made_concept(shapes, f"<new{n}>", noun, seed=n) for n, noun in ((1, "cat"), (2, "dog"))]
    return [replace(concept, scope="own words") for concept in made]


def in_comfyui(
    loaded: Any, pipeline: Any, regions: Sequence[Region], start: float | None
) -> Tensor:
    """By Euler's method over the noise levels of the other host's steps, which is DDIM."""
    import comfy.samplers
    from custom_diffusion.host.comfyui.isolation import isolated_guider
    from custom_diffusion.host.comfyui.regions import apply_regions

    with torch.inference_mode():
        applied = apply_regions(loaded.model, loaded.clip, PROMPT, regions, found_at=0.4)
        negative = encode(applied.clip, "")
        if start is None:
            guider = comfy.samplers.CFGGuider(applied.model)
            guider.set_conds(applied.positive, negative)
            guider.set_cfg(GUIDANCE)
        else:
            guider = isolated_guider(applied.model, applied.positive, negative, GUIDANCE, start)
        alphas = pipeline.scheduler.alphas_cumprod
        alphas = alphas[torch.linspace(len(alphas) - 1, 0, STEPS + 1).long()]
        noise = torch.cat([noise_of(seed) for seed in (0, 1)])
        latents = guider.sample(
            noise,
            torch.zeros_like(noise),
            comfy.samplers.sampler_object("euler"),
            ((1 - alphas) / alphas).sqrt(),
            disable_pbar=True,
            seed=0,
        )
        return latents * pipeline.vae.config.scaling_factor * alphas[-1].sqrt()


def noise_of(seed: int) -> Tensor:
    return torch.randn(1, 4, EDGE, EDGE, generator=torch.Generator().manual_seed(seed))


def in_diffusers(pipeline: Any, regions: Sequence[Region], start: float | None) -> Tensor:
    return sample_in_diffusers(
        pipeline,
        [PROMPT] * 2,
        regions=[regions] * 2,
        found_at=0.4,
        isolated_from=start,
        resolution=8 * EDGE,
        seeds=(0, 1),
        steps=STEPS,
        guidance=GUIDANCE,
        as_latents=True,
    )


@pytest.mark.parametrize(
    ("found", "start"),
    [(1, None), (2, 0.4)],
    ids=["one given and one found", "found, then apart"],
)
def test_the_same_latents(
    sd15: Any, pipeline: Any, concepts: list[Concept], found: int, start: float | None
) -> None:
    masks = [None] * found + [box(0, 0, 0.5, 1), box(0.5, 0.25, 0.5, 0.5)][found:]
    regions = [
        Region("", mask, Route(concept, strength), 0.1)
        for mask, concept, strength in zip(masks, concepts, (1.0, 0.7), strict=True)
    ]
    ours, theirs = (
        in_comfyui(sd15, pipeline, regions, start),
        in_diffusers(pipeline, regions, start),
    )
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"{found} found, apart from {start}: differs by {difference:.1e}")
    assert difference < LIMIT
