"""ComfyUI's CLIP_VISION and CLIP as a feature model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...concept.errors import IncompatibleModelError
from ...evaluation.features import WORD, Judge, picture_features
from .models.text import encoder_names

NO_JUDGE = (
    "No feature model is connected, so nothing is measured: look at the sheet. For figures, put a "
    "CLIP vision model (clip_vision_l.safetensors of openai/clip-vit-large-patch14, for one) into "
    "models/clip_vision, load it with Load CLIP Vision, and connect it to clip_vision. Nothing is "
    "downloaded."
)
NO_TEXT = (
    "Text alignment is not measured: this CLIP has no projection into the space of clip_vision. "
    "Put the whole text half of the same CLIP (clip_l.safetensors for ViT-L/14) into "
    "models/text_encoders, load it with Load CLIP, and connect it to judge_clip."
)


def judge_of(clip_vision: Any, judge_clip: Any, clip: Any, example: Image.Image) -> Judge:
    """A CLIP_VISION with the text half that was chosen for it, or with the model's own CLIP where
    that has a projection of the same width.
    """
    reader = clip if judge_clip is None else judge_clip

    def image_features(images_bhwc: Tensor) -> Tensor:
        found: Tensor = clip_vision.encode_image(images_bhwc)["image_embeds"]
        return found

    def text_features(texts: Sequence[str]) -> Tensor:
        pooled = [
            reader.encode_from_tokens(reader.tokenize(text), return_pooled=True)[1]
            for text in texts
        ]
        return torch.cat(pooled)

    blank = Judge("CLIP vision", image_features, remarks=(NO_TEXT,))
    width = projection_width(reader)
    if judge_clip is None and width != picture_features(blank, [example]).shape[1]:
        return blank
    if not width:
        raise IncompatibleModelError(
            f"The CLIP on judge_clip cannot be compared with pictures. {NO_TEXT}"
        )
    words = _words(reader)
    judge = Judge("CLIP vision and its text half", image_features, text_features, words[-1])
    return judge.compared_with(_words(clip))


def projection_width(clip: Any) -> int:
    """Of the space in which a CLIP places texts among pictures; 0 where it has no projection: then
    ComfyUI leaves there what the memory held, no numbers, noughts, or some of an untrained size.
    """
    last = getattr(clip.cond_stage_model, encoder_names(clip)[-1])
    weight = last.transformer.text_projection.weight.detach().float()
    size = float(weight.square().mean().sqrt()) * len(weight) ** 0.5
    return len(weight) if weight.isfinite().all() and 0.1 < size < 10 else 0


def _words(clip: Any) -> list[Tensor]:
    """How its text encoders embed `WORD`; the last one is what a pooled feature comes from."""
    encoders = [getattr(clip.cond_stage_model, name) for name in encoder_names(clip)]
    return [
        one.transformer.get_input_embeddings().weight[WORD].detach().float().cpu()
        for one in encoders
    ]
