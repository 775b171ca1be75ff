"""Regularization sets: drawn by the loaded model with ComfyUI's own samplers, or retrieved."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
from torch import Tensor

from ...concept.errors import DataError, IncompatibleModelError
from ...concept.naming import safe_file_name
from ...concept.prompts import DEFAULT_TEMPLATE
from ...trainer.data.captioned import CaptionedImage
from ...trainer.regularization.caption_index import CaptionIndex
from ...trainer.regularization.collection import parts_of
from ...trainer.regularization.drawn import generated_set, settings_hash
from ...trainer.regularization.retrieved import retrieve
from ..open_clip.text import OpenClipText, check_clip_model
from .drawing import Sampling, sampled_pictures
from .models.weights import cross_attention_unet, patched_fingerprint
from .paths import NO_FOLDER, cache_folder, clip_weights_path, input_folder, regularization_folder

log = logging.getLogger("custom_diffusion")


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
        "model": patched_fingerprint(model),
        "clip": f"{patched_fingerprint(clip.patcher)}, layer {clip.layer_idx}",
        "vae": patched_fingerprint(vae.patcher),
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
    sampling = Sampling(steps, cfg, sampler_name, scheduler, resolution)

    def draw(numbers: Sequence[int]) -> Tensor:
        return sampled_pictures(model, vae, positive, negative, sampling, seed, numbers)

    progress = comfy.utils.ProgressBar(count)
    return generated_set(
        _folder(class_noun, {**settings, "caption": caption}),
        settings,
        caption,
        count,
        draw,
        batch_size=batch_size,
        on_progress=lambda done, total: progress.update_absolute(done, total),
    )


def retrieve_regularization(
    collection: str,
    *,
    class_noun: str,
    count: int,
    similarity: float,
    clip_model: str,
    clip_weights: str,
) -> tuple[CaptionedImage, ...]:
    """Pictures of the class out of a captioned collection below `input/`, by CLIP's text space.

    Its captions are read once; interrupting keeps what is read.
    """
    if collection == NO_FOLDER:
        raise DataError("No collection was chosen. Put one into ComfyUI's input folder, or a link.")
    progress = comfy.utils.ProgressBar(1)

    def show(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update_absolute(done, total)

    device = comfy.model_management.text_encoder_device()
    embed = OpenClipText(clip_model, clip_weights_path(clip_weights), str(device))
    index = CaptionIndex(input_folder(collection), cache_folder(), embed.name)
    captions = index.update(embed, show)
    prompt = DEFAULT_TEMPLATE.format(class_noun)
    settings = {"index": index.name, "captions": captions, "count": count, "least": similarity}
    folder = _folder(class_noun, {**settings, "caption": prompt})
    got = retrieve(index, embed, prompt, folder, count, similarity)
    log.info(
        "%d of %d pictures, similarity to %r at least %.2f, %d broken ones passed over: %s",
        *(len(got.images), captions, prompt, got.least_similarity, got.broken, folder),
    )
    return got.images


def clip_problem(clip_model: str | None, clip_weights: str | None) -> str:
    """Why captions cannot be embedded with these; empty where they can be tried. A value that
    another node makes is None until then.
    """
    try:
        if clip_model is not None:
            check_clip_model(clip_model)
        if clip_weights is not None:
            clip_weights_path(clip_weights)
    except IncompatibleModelError as error:
        return str(error)
    return ""


def collection_fingerprint(collection: str) -> str:
    """Changes when a shard, a table or a folder of the collection does."""
    if collection == NO_FOLDER:
        return ""
    parts = parts_of(input_folder(collection))
    return settings_hash({str(part.path): part.fingerprint() for part in parts})


def _folder(class_noun: str, settings: Mapping[str, Any]) -> Path:
    name = f"{safe_file_name(class_noun)}-{settings_hash(settings)}"
    return regularization_folder() / name
