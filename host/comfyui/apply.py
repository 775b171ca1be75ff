"""A concept on ComfyUI's loaded model: weight patches on a cloned MODEL, new words on a cloned
CLIP.
"""

from __future__ import annotations

from typing import Any

import comfy.lora

from ...concept.concept import Concept
from ...concept.errors import IncompatibleModelError
from ...concept.file import concept_tensors
from ...concept.fit import check_fit
from .models.weights import cross_attention_unet, unet_family
from .tokenizer import with_concept_tokens


def apply_concept(model: Any, clip: Any, concept: Concept, strength: float) -> tuple[Any, Any]:
    """Clones of MODEL and CLIP with the concept; at strength 0 the inputs themselves.

    The patches are the ones that a stock LoRA loader makes of the concept's file, so other patches,
    hooks and low-memory modes treat them alike.
    """
    check_models(model, clip, concept)
    if strength == 0:
        return model, clip
    keys = {
        f"diffusion_model.{layer}": f"diffusion_model.{layer}.weight" for layer in concept.deltas
    }
    tensors = {
        k: t for k, t in concept_tensors(concept).items() if k.startswith("diffusion_model.")
    }
    patched = model.clone()
    patched.add_patches(comfy.lora.load_lora(tensors, keys), strength)
    knowing = clip.clone()
    knowing.tokenizer = with_concept_tokens(clip.tokenizer, concept)
    return patched, knowing


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
