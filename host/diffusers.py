"""The pack without ComfyUI: training, merging and sampling on the components of a diffusers
pipeline.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..concept.concept import Concept
from ..concept.errors import ConceptFileError, IncompatibleModelError
from ..concept.fit import check_fit
from ..concept.layers import (
    Family,
    family_of_width,
    is_cross_attention,
    is_projection,
    layer_from_diffusers,
)
from ..concept.tensors import read_tensors
from ..concept.text import TextEncoder
from ..trainer.config import LATENT_PIXELS
from ..trainer.protocols import Prediction
from ..trainer.sampling import ddim_sample
from .clip_pair import ClipTextEncoderPair
from .clip_text import ClipTextEncoder
from .pipeline_folder import read_pipeline

_BLOCK = re.compile(r"\.(resnets|attentions)\.\d+$")
_PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v"}


class DiffusersDenoiser:
    """A `UNet2DConditionModel` with its schedule; fulfils `trainer.protocols.Denoiser`."""

    def __init__(self, unet: Any, scheduler: Any, vae: Any) -> None:
        self.projections: Mapping[str, str] = {
            layer_from_diffusers(path): path for path, _ in _projections(unet)
        }
        if unet.config.get("layers_per_block", 2) != 2:
            raise IncompatibleModelError(
                f"This UNet has {unet.config.layers_per_block} layers a block; every Stable "
                f"Diffusion has 2, and concepts are named after those. Load the UNet of SD 1.x, "
                f"SD 2.x or SDXL."
            )
        if not self.projections or not isinstance(unet.config.cross_attention_dim, int):
            raise IncompatibleModelError(
                f"{type(unet).__name__} has no cross-attention with key and value projections. "
                f"Custom Diffusion needs the UNet of Stable Diffusion 1.x, 2.x or XL."
            )
        self.family = family_of_width(unet.config.cross_attention_dim)
        beside = unet.config.get("addition_embed_type")
        if beside != ("text_time" if self.family.pooled_width else None):
            raise IncompatibleModelError(
                f"This UNet reads text features of {self.family.title}, and beside them "
                f"{beside or 'nothing'}. SDXL's reads 'text_time', that of SD 1.x or 2.x nothing; "
                f"load one of these."
            )
        if scheduler.config.prediction_type not in _PREDICTIONS:
            raise IncompatibleModelError(
                f"The scheduler predicts {scheduler.config.prediction_type!r}; "
                f"epsilon or v_prediction is needed."
            )
        self.prediction = _PREDICTIONS[scheduler.config.prediction_type]
        self.alphas_cumprod = scheduler.alphas_cumprod.float().cpu()
        self.network: nn.Module = unet
        self.blocks: Sequence[str] = [
            path for path, _ in unet.named_modules() if _BLOCK.search(path)
        ]
        self.device: torch.device = unet.device
        self.dtype: torch.dtype = unet.conv_in.weight.dtype
        self._vae = vae

    def predict(
        self,
        noisy_latents_bchw: Tensor,
        timesteps: Tensor,
        context: Tensor,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        beside = None
        if self.family.pooled_width:
            assert pooled is not None and sizes is not None, "this UNet reads both"
            beside = {"text_embeds": pooled.to(self.device, self.dtype), "time_ids": sizes}
        output = self.network(
            noisy_latents_bchw.to(self.dtype),
            timesteps,
            encoder_hidden_states=context.to(self.dtype),
            added_cond_kwargs=beside,
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
    text_encoder: ClipTextEncoder | ClipTextEncoderPair
    latent_encoder: DiffusersLatentEncoder


def load_pipeline(
    folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """A pipeline of Stable Diffusion 1.x, 2.x or XL from a folder in diffusers' layout.

    Frozen weights compute in `dtype`; the UNet's key and value projections keep float32, from which
    they are trained, and so does SDXL's autoencoder, whose numbers grow too large for half
    precision. Nothing that the folder holds is executed, and nothing is downloaded.
    """
    pipeline = read_pipeline(Path(folder))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    for model in _text_models(pipeline):  # transformers leaves them in the type of their file
        model.float()
    exact = {path: module.weight.detach() for path, module in _projections(pipeline.unet)}
    pipeline.unet.to(dtype)
    if not text_family(pipeline).pooled_width:
        pipeline.vae.to(dtype)
    for path, weight in exact.items():
        pipeline.unet.get_submodule(path).weight.data = weight
    return pipeline


def load_network(pipeline: Any, path: Path) -> None:
    """Gives the pipeline's UNet the weights of a file, as `trainer.network_file` writes it."""
    try:
        pipeline.unet.load_state_dict(read_tensors(path)[0])
    except (ConceptFileError, RuntimeError) as error:
        raise IncompatibleModelError(
            f"{path} holds no UNet of this model ({str(error).splitlines()[0]}). Give the file "
            f"that `train --method dreambooth` or `fine-tune all` left for it."
        ) from error


@contextmanager
def borrowed_models(pipeline: Any) -> Iterator[DiffusersModels]:
    """The pipeline's models, frozen while the context lasts and as before afterwards."""
    modules = (pipeline.unet, *_text_models(pipeline), pipeline.vae)
    flags = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.requires_grad_(False).train(False)
        yield DiffusersModels(
            DiffusersDenoiser(pipeline.unet, pipeline.scheduler, pipeline.vae),
            text_encoder(pipeline),
            DiffusersLatentEncoder(pipeline.vae),
        )
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for part, mode in modes:
            part.training = mode


def text_family(pipeline: Any) -> Family:
    """The model family, from the width of its text features."""
    return family_of_width(sum(model.config.hidden_size for model in _text_models(pipeline)))


def text_encoder(pipeline: Any) -> ClipTextEncoder | ClipTextEncoderPair:
    """The pipeline's text encoder with its tokenizer, or both of SDXL's as one."""
    family = text_family(pipeline)
    if not family.pooled_width:
        (name,) = family.text_encoders
        tokenizer = pipeline.tokenizer
        return ClipTextEncoder(
            name, pipeline.text_encoder, tokenizer, pad_id=tokenizer.pad_token_id
        )
    first, second = (
        ClipTextEncoder(
            name, model, tokenizer, pad_id=tokenizer.pad_token_id, hidden_layer=-2, normed=False
        )
        for name, model, tokenizer in zip(
            family.text_encoders,
            _text_models(pipeline),
            (pipeline.tokenizer, pipeline.tokenizer_2),
            strict=True,
        )
    )
    return ClipTextEncoderPair(first, second)


@contextmanager
def applied_concept(
    pipeline: Any, concept: Concept | None, strength: float = 1.0
) -> Iterator[TextEncoder]:
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
    resolution: int = 512,
    seeds: Sequence[int] = (),
    steps: int = 50,
    guidance: float = 6.0,
) -> Tensor:
    """A picture of each prompt (b, h, w, 3) in 0..1, with the concept or without.

    Each starts from noise of its own seed, by default 0, 1, 2 and so on.
    """
    with (
        applied_concept(pipeline, concept, strength) as encoder,
        borrowed_models(pipeline) as models,
    ):
        text, nothing = (
            encoder.encode_with_pooled(encoder.pad([encoder.tokenize(prompt) for prompt in texts]))
            for texts in (prompts, [""] * len(prompts))
        )
        edge = resolution // LATENT_PIXELS
        shape = (pipeline.unet.config.in_channels, edge, edge)
        noise = torch.stack(
            [
                torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                for _, seed in zip(prompts, seeds or range(len(prompts)), strict=True)
            ]
        )
        latents = ddim_sample(
            models.denoiser.predict,
            noise.to(models.denoiser.device),
            text,
            nothing,
            models.denoiser.alphas_cumprod,
            models.denoiser.prediction,
            steps,
            guidance,
        )
        return models.denoiser.preview(latents).cpu()


def side_by_side(images_bhwc: Tensor) -> Image.Image:
    """Pictures in 0..1 as one."""
    row = torch.cat(list(images_bhwc), dim=1)
    return Image.fromarray((row * 255).round().byte().numpy())


def _text_models(pipeline: Any) -> list[Any]:
    models = pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)
    return [model for model in models if model is not None]


def _projections(unet: Any) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in unet.named_modules() if is_projection(path)]
