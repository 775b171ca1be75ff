"""Drawing with a pipeline, with and without a concept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...composition.places import FOUND_AT, Places
from ...composition.regions import Region
from ...composition.routing import Route
from ...concept.concept import Concept
from ...concept.fit import check_fit, check_weight_patches
from ...concept.layers import family_of_width, is_cross_attention, layer_from_diffusers
from ...diffusion.latents import LATENT_PIXELS
from ...diffusion.sampling import Predict, ddim_sample
from ...pictures.tensors import to_picture
from ..clip.chunks import Encoder, as_long_as, encode_prompts
from .isolation import isolated
from .lending import borrowed_models, text_encoder
from .routing import regional, route, routing


@contextmanager
def applied_concept(
    pipeline: Any, concept: Concept | None, strength: float = 1.0
) -> Iterator[Encoder]:
    """The pipeline with a concept added to its UNet; yields a text encoder that knows the tokens.

    Afterwards every weight is bit for bit what it was. Without a concept it is the base model.
    """
    unet = pipeline.unet
    own = {
        path: module.weight.data
        for path, module in unet.named_modules()
        if is_cross_attention(path)
    }
    layers = {layer_from_diffusers(path): path for path in own}
    if concept is not None:
        check_weight_patches(concept)
        family = family_of_width(unet.config.cross_attention_dim)
        check_fit(
            concept, family, {layer: tuple(own[path].shape) for layer, path in layers.items()}
        )
    try:
        for layer, path in layers.items():
            weight = own[path].float()
            if concept is not None and layer in concept.deltas:
                weight = weight + strength * concept.deltas[layer].dense().to(weight)
            unet.get_submodule(path).weight.data = weight.to(unet.conv_in.weight.dtype)
        words = concept.embeddings() if concept is not None else {}
        yield text_encoder(pipeline).with_tokens(words)
    finally:
        for path, weight in own.items():
            unet.get_submodule(path).weight.data = weight


@torch.no_grad()
def sample(
    pipeline: Any,
    prompts: Sequence[str],
    concept: Concept | None = None,
    *,
    strength: float = 1.0,
    routes: Sequence[Route] = (),
    regions: Sequence[Sequence[Region]] = (),
    found_at: float = FOUND_AT,
    isolated_from: float | None = None,
    on_places: Callable[[Sequence[Places]], None] | None = None,
    resolution: int = 512,
    seeds: Sequence[int] = (),
    steps: int = 50,
    guidance: float = 6.0,
    as_latents: bool = False,
) -> Tensor:
    """A picture of each prompt (b, h, w, 3) in 0..1, with the concept or without, or its latents
    (b, c, h / 8, w / 8).

    Prompts may be of any length and have weights, `(cat:1.2)`, as in ComfyUI. `concept` is added to
    the weights; those of `routes` act at their own words alone. `regions` has those of each
    picture, or is empty; those without a mask are found in the part of the sampling until
    `found_at`, and from `isolated_from` on all are denoised apart. `on_places` is told at the end
    where they were. Each picture starts from noise of its own seed, by default 0, 1, 2 and so on.
    """
    with (
        applied_concept(pipeline, concept, strength) as encoder,
        borrowed_models(pipeline) as models,
        routing(pipeline) as router,
        regional(pipeline, router) as attention,
    ):
        routes = _every_route(routes, regions)
        for one in routes:
            encoder = encoder.with_tokens(one.concept.embeddings())
        text = encode_prompts(encoder, prompts)
        nothing = encode_prompts(encoder, [""] * len(prompts))
        nothing = nothing._replace(context=as_long_as(text.context, nothing.context))
        if routes or regions:
            context = torch.cat([text.context, nothing.context]).to(models.denoiser.device)
            both = [*prompts, *[""] * len(prompts)]
            attention.sets = route(router, routes, encoder, both, context, regions, found_at)
            attention.chosen = [*range(1, len(regions) + 1), *[0] * len(prompts)] if regions else []
        edge = resolution // LATENT_PIXELS
        shape = (pipeline.unet.config.in_channels, edge, edge)
        attention.size = (edge, edge)
        noise = torch.stack(
            [
                torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                for _, seed in zip(prompts, seeds or range(len(prompts)), strict=True)
            ]
        )
        predict: Predict = models.denoiser.predict
        if isolated_from is not None:
            last = len(models.denoiser.alphas_cumprod) - 1
            predict = isolated(predict, attention, isolated_from, last)
        latents = ddim_sample(
            predict,
            noise.to(models.denoiser.device),
            text,
            nothing,
            models.denoiser.alphas_cumprod,
            models.denoiser.prediction_type,
            steps,
            guidance,
        )
        if on_places is not None:
            on_places([said.places for said in attention.sets])
        return (latents if as_latents else models.denoiser.preview(latents)).cpu()


def _every_route(routes: Sequence[Route], regions: Sequence[Sequence[Region]]) -> Sequence[Route]:
    every = list(routes)
    for region in (region for listed in regions for region in listed):
        if region.route is not None and not any(region.route is one for one in every):
            every.append(region.route)
    return every


def side_by_side(images_bhwc: Tensor) -> Image.Image:
    """Pictures in 0..1 as one."""
    return to_picture(torch.cat(list(images_bhwc), dim=1))
