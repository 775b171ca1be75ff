"""The pack without ComfyUI: training, merging and sampling on the components of a diffusers
pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..concept.concept import Concept
from ..concept.errors import IncompatibleModelError
from ..concept.layers import (
    Family,
    family_of_width,
    is_projection,
    layer_from_diffusers,
    layer_to_diffusers,
)
from ..trainer.config import LATENT_PIXELS
from ..trainer.protocols import Prediction
from ..trainer.sampling import ddim_sample
from .clip_text import ClipTextEncoder

_PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v"}


class DiffusersDenoiser:
    """A `UNet2DConditionModel` with its schedule; fulfils `trainer.protocols.Denoiser`."""

    def __init__(self, unet: Any, scheduler: Any, vae: Any) -> None:
        self.projections: Mapping[str, str] = {
            layer_from_diffusers(path): path
            for path, _ in unet.named_modules()
            if is_projection(path)
        }
        if not self.projections or not isinstance(unet.config.cross_attention_dim, int):
            raise IncompatibleModelError(
                f"{type(unet).__name__} has no cross-attention with key and value projections. "
                f"Custom Diffusion needs a Stable Diffusion 1.x or 2.x UNet."
            )
        self.family = family_of_width(unet.config.cross_attention_dim)
        if scheduler.config.prediction_type not in _PREDICTIONS:
            raise IncompatibleModelError(
                f"The scheduler predicts {scheduler.config.prediction_type!r}; "
                f"epsilon or v_prediction is needed."
            )
        self.prediction = _PREDICTIONS[scheduler.config.prediction_type]
        self.alphas_cumprod = scheduler.alphas_cumprod.float().cpu()
        self.network: nn.Module = unet
        self.device: torch.device = unet.device
        self.dtype: torch.dtype = unet.conv_in.weight.dtype
        self._vae = vae

    def predict(self, noisy_latents_bchw: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        output = self.network(
            noisy_latents_bchw.to(self.dtype),
            timesteps,
            encoder_hidden_states=context.to(self.dtype),
        )
        return output.sample.float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def preview(self, latents_bchw: Tensor) -> Tensor:
        latents = latents_bchw.to(self._vae.dtype) / self._vae.config.scaling_factor
        images = self._vae.decode(latents).sample.float()
        return (images.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)  # type: ignore[no-any-return]


class DiffusersLatentEncoder:
    """An `AutoencoderKL`; fulfils `trainer.protocols.LatentEncoder`."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    @torch.no_grad()
    def moments(self, image_chw: Tensor) -> tuple[Tensor, Tensor]:
        pixels = image_chw[None].to(self._vae.device, self._vae.dtype)
        posterior = self._vae.encode(pixels).latent_dist
        scale = self._vae.config.scaling_factor
        return (posterior.mean[0] * scale).float().cpu(), (posterior.std[0] * scale).float().cpu()


@dataclass(frozen=True)
class DiffusersModels:
    """A pipeline seen through the trainer's protocols."""

    denoiser: DiffusersDenoiser
    text_encoder: ClipTextEncoder
    latent_encoder: DiffusersLatentEncoder


def load_pipeline(
    folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """A Stable Diffusion pipeline from a folder in diffusers' layout, or a name in the local hub
    cache.

    The frozen weights compute in `dtype`; key and value projections stay in float32.
    """
    from diffusers import StableDiffusionPipeline

    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            str(folder),
            safety_checker=None,
            requires_safety_checker=False,
            torch_dtype=torch.float32,
        )
    except (OSError, ValueError) as error:
        raise IncompatibleModelError(
            f"{folder} could not be loaded as a Stable Diffusion pipeline ({error}). "
            f"Give a folder in diffusers' layout, with model_index.json in it."
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    keep_projections = {
        path: module.weight.detach()
        for path, module in pipeline.unet.named_modules()
        if is_projection(path)
    }
    pipeline.unet.to(dtype)
    pipeline.vae.to(dtype)
    for path, weight in keep_projections.items():
        pipeline.unet.get_submodule(path).weight.data = weight
    return pipeline


@contextmanager
def borrowed_models(pipeline: Any) -> Iterator[DiffusersModels]:
    """The pipeline's models, frozen while the context lasts and as before afterwards."""
    modules = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    flags = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    modes = [(module, module.training) for module in modules]
    try:
        for module in modules:
            module.requires_grad_(False).eval()
        yield DiffusersModels(
            DiffusersDenoiser(pipeline.unet, pipeline.scheduler, pipeline.vae),
            text_encoder(pipeline),
            DiffusersLatentEncoder(pipeline.vae),
        )
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.train(mode)


def text_family(pipeline: Any) -> Family:
    """The model family, from the width of the text encoder."""
    return family_of_width(pipeline.text_encoder.config.hidden_size)


def text_encoder(pipeline: Any) -> ClipTextEncoder:
    """The pipeline's text encoder with its tokenizer."""
    return ClipTextEncoder(
        text_family(pipeline).text_encoders[0],
        pipeline.text_encoder,
        pipeline.tokenizer,
        pad_id=pipeline.tokenizer.pad_token_id,
    )


@contextmanager
def applied_concept(
    pipeline: Any, concept: Concept, strength: float = 1.0
) -> Iterator[ClipTextEncoder]:
    """The pipeline with the concept added to its UNet; yields a text encoder that knows the tokens.

    Afterwards every weight is bit for bit what it was.
    """
    unet = pipeline.unet
    paths = {layer: layer_to_diffusers(layer) for layer in concept.layers}
    known = dict(unet.named_modules())
    if missing := [layer for layer, path in paths.items() if path not in known]:
        raise IncompatibleModelError(
            f"The concept {concept.describe()} changes {len(missing)} projections that this model "
            f"does not have, {missing[0]} for example. Load the base model it was trained on."
        )
    own = {path: known[path].weight.data for path in paths.values()}
    try:
        for layer, path in paths.items():
            weight = own[path]
            change = strength * concept.deltas[layer].dense().to(weight.device, torch.float32)
            known[path].weight.data = (weight.float() + change).to(weight.dtype)
        yield text_encoder(pipeline).with_tokens(concept.embeddings())
    finally:
        for path, weight in own.items():
            known[path].weight.data = weight


@torch.no_grad()
def sample(
    pipeline: Any,
    prompt: str,
    concept: Concept | None = None,
    *,
    strength: float = 1.0,
    count: int = 1,
    resolution: int = 512,
    seed: int = 0,
    steps: int = 50,
    guidance: float = 6.0,
) -> Image.Image:
    """`count` pictures of a prompt side by side, with the concept or without."""
    empty = Concept(family=text_family(pipeline), deltas={})
    with (
        applied_concept(pipeline, concept or empty, strength) as encoder,
        borrowed_models(pipeline) as models,
    ):
        context, nothing = (
            encoder.encode(encoder.pad([encoder.tokenize(text)])).expand(count, -1, -1)
            for text in (prompt, "")
        )
        edge = resolution // LATENT_PIXELS
        noise = torch.randn(count, 4, edge, edge, generator=torch.Generator().manual_seed(seed))
        latents = ddim_sample(
            models.denoiser.predict,
            noise.to(models.denoiser.device),
            context,
            nothing,
            models.denoiser.alphas_cumprod,
            models.denoiser.prediction,
            steps,
            guidance,
        )
        images_bhwc = (models.denoiser.preview(latents) * 255).round().byte().cpu()
    return Image.fromarray(torch.cat(list(images_bhwc), dim=1).numpy())
