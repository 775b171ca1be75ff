"""Editing words of ComfyUI's loaded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.utils

from ...concept.concept import Concept
from ...merge.edit_report import EditReport
from ...merge.editing import edit_again
from ...merge.edits import Edit
from ...merge.key_lock import KeyLockReport, lock_keys
from .inputs import chosen_captions
from .models.text import text_encoder
from .models.weights import base_model
from .paths import cache_folder


def edit_in_comfyui(
    model: Any,
    clip: Any,
    edits: Sequence[Edit],
    *,
    earlier: Concept | None,
    restore: Mapping[str, float],
    preserved: Sequence[str],
    softness: float,
    captions: str,
) -> tuple[Concept, EditReport]:
    """`edit_concept` of a MODEL and a CLIP as they are, patches and words of concepts included;
    with `earlier` the edits of both, and what is restored of it.
    """
    progress = comfy.utils.ProgressBar(100)
    return edit_again(
        earlier,
        base_model(model).weights,
        text_encoder(clip),
        edits,
        restore=restore,
        preserved=preserved,
        softness=softness,
        captions=chosen_captions(captions),
        cache_folder=cache_folder(),
        on_progress=lambda fraction: progress.update_absolute(int(100 * fraction), 100),
    )


def lock_keys_in_comfyui(
    model: Any, clip: Any, concept: Concept, captions: str
) -> tuple[Concept, KeyLockReport]:
    """`lock_keys` with a MODEL's weights and a CLIP's text encoder."""
    progress = comfy.utils.ProgressBar(100)
    return lock_keys(
        concept,
        base_model(model).weights,
        text_encoder(clip),
        captions=chosen_captions(captions),
        cache_folder=cache_folder(),
        on_progress=lambda fraction: progress.update_absolute(int(100 * fraction), 100),
    )
