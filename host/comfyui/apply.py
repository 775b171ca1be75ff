"""A concept on ComfyUI's loaded model: weight patches on a cloned MODEL, new words on a cloned
CLIP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import comfy.hooks
import comfy.lora

from ...composition.features import plain
from ...composition.timing import WHOLE, Span
from ...concept.concept import Concept
from ...concept.errors import IncompatibleModelError
from ...concept.file import delta_tensors
from ...concept.fit import TEXT_MARK, check_fit, check_weight_patches, text_remark
from ...concept.text import MARK_PROMPT, mark_of
from .models.text import encoder_names
from .models.weights import cross_attention_unet, unet_family
from .timed_clip import timed_clip
from .timing import timed_concept
from .tokenizer import with_concept_tokens


def apply_concept(
    model: Any, clip: Any, concept: Concept, strength: float, span: Span = WHOLE
) -> tuple[Any, Any]:
    """Clones of MODEL and CLIP with the concept; at strength 0 the inputs themselves.

    The patches are the ones that a stock LoRA loader makes of the concept's file, so other patches,
    hooks and low-memory modes treat them alike. For a part of the sampling nothing is patched
    (`timing.py`).
    """
    check_models(model, clip, concept)
    if strength == 0:
        return model, clip
    if not span.is_whole:
        knowing = timed_clip(_knowing(clip, concept), [concept], span)
        return timed_concept(model, concept, strength, span), knowing
    patched = model.clone()
    patched.add_patches(_patches(concept), strength)
    return patched, _knowing(clip, concept)


def hook_concept(model: Any, clip: Any, concept: Concept, strength: float) -> tuple[Any, Any]:
    """A clone of CLIP with the concept's words, and HOOKS that carry what the concept changes, for
    the prompts that they are set on: ComfyUI masks, schedules and combines them.
    """
    check_models(model, clip, concept)
    hook = comfy.hooks.WeightHook(strength_model=strength, strength_clip=0.0)
    hook.weights, hook.weights_clip = _patches(concept), {}
    hook.need_weight_init = False  # they are ComfyUI's own patches already
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return _knowing(clip, concept), group


def _patches(concept: Concept) -> Mapping[str, Any]:
    check_weight_patches(concept)
    keys = {
        f"diffusion_model.{layer}": f"diffusion_model.{layer}.weight" for layer in concept.deltas
    }
    patches: Mapping[str, Any] = comfy.lora.load_lora(delta_tensors(concept), keys)
    return patches


def _knowing(clip: Any, concept: Concept) -> Any:
    knowing = clip.clone()
    knowing.tokenizer = with_concept_tokens(clip.tokenizer, concept)
    return knowing


def text_remarks(clip: Any, concepts: Iterable[Concept]) -> list[str]:
    """What a user should know of concepts that were made with another CLIP, or at another clip
    skip. The CLIP reads a short prompt for it, if any of the concepts remembers.
    """
    remembering = [concept for concept in concepts if TEXT_MARK in concept.provenance]
    if not remembering:
        return []
    tokenizer = getattr(clip.tokenizer, encoder_names(clip)[0])
    end = len(tokenizer.tokenizer(MARK_PROMPT)["input_ids"]) - 1
    features = clip.encode_from_tokens(clip.tokenize(MARK_PROMPT))
    mark = mark_of(plain(features)[0, end])
    return [remark for concept in remembering if (remark := text_remark(concept, mark))]


def check_models(model: Any, clip: Any, concept: Concept) -> None:
    """Raises IncompatibleModelError when the concept does not belong on them."""
    if clip is None:
        raise IncompatibleModelError(
            "No CLIP was given: the checkpoint has no text encoder. Connect the CLIP of the "
            "concept's base model, which learns the concept's trigger words."
        )
    network = cross_attention_unet(model)
    shapes = {n.removesuffix(".weight"): tuple(p.shape) for n, p in network.named_parameters()}
    check_fit(concept, unet_family(network), shapes)
