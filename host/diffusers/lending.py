"""A pipeline's models, lent to a training or a merge and put back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...concept.layers import Family, family_of_width
from ...diffusion.parts import check_parts
from ..clip.pair import ClipTextEncoderPair
from ..clip.text_encoder import ClipTextEncoder
from .denoiser import DiffusersDenoiser, DiffusersLatentEncoder
from .parts import autoencoder_of, network_of, scheduler_noise


@dataclass(frozen=True)
class DiffusersModels:
    """A pipeline seen through the trainer's protocols."""

    denoiser: DiffusersDenoiser
    text_encoder: ClipTextEncoder | ClipTextEncoderPair
    latent_encoder: DiffusersLatentEncoder


@contextmanager
def borrowed_models(pipeline: Any) -> Iterator[DiffusersModels]:
    """The pipeline's models, frozen while the context lasts and as before afterwards."""
    modules = (pipeline.unet, *_text_models(pipeline), pipeline.vae)
    flags = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    modes = [(part, part.training) for module in modules for part in module.modules()]
    check_pipeline(pipeline)
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


def check_pipeline(pipeline: Any) -> None:
    """Raises IncompatibleModelError unless its parts go together."""
    check_parts(
        network_of(pipeline.unet),
        scheduler_noise(pipeline.scheduler),
        autoencoder_of(pipeline.vae),
        sum(model.config.hidden_size for model in _text_models(pipeline)),
    )


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


def _text_models(pipeline: Any) -> list[Any]:
    models = pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)
    return [model for model in models if model is not None]
