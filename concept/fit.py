"""Whether a concept belongs on a model, and if not, why: the one place that knows. Every host asks
before it applies one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .concept import Concept
from .errors import IncompatibleModelError
from .layers import Family
from .text import MARK_PROMPT

TEXT_MARK = "text_mark"
"""Key of a concept's provenance: `concept.text.text_mark` of the encoder that it was made with"""
_OTHER_TEXT = 0.05
"""Relative distance of marks; bfloat16 moves them by 0.01, the next layer by 0.2 and more"""


@dataclass(frozen=True)
class Fit:
    """How a concept suits a model."""

    misfits: tuple[str, ...] = ()
    """Why it cannot be applied to the model; empty where it can."""
    remark: str = ""
    """What may show in pictures although it can be applied"""


def fit_to(
    concept: Concept, family: Family, shapes: Mapping[str, tuple[int, ...]], base_hash: str
) -> Fit:
    """How a concept suits a model: `misfits`, and whether it is another checkpoint.

    `base_hash` is `hash_projections` of the model's own key and value projections.
    """
    reasons = tuple(misfits(concept, family, shapes))
    if reasons or not concept.base_hash or concept.base_hash == base_hash:
        return Fit(reasons)
    return Fit(
        remark=f"it was trained on another checkpoint of {family.title}, or this one has patches "
        f"on it (base hash {concept.base_hash[:8]}, this model's is {base_hash[:8]}); pictures may "
        f"be less like the concept"
    )


def misfits(concept: Concept, family: Family, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every reason why a concept cannot be applied to a model; of another family, that alone.

    `shapes` are the model's weights by layer name, (out, in).
    """
    if family != concept.family:
        return [
            f"it was trained on {concept.family.title} (text width "
            f"{concept.family.context_width}); this model is {family.title} "
            f"({family.context_width})"
        ]
    return [
        f"{layer} is {concept.deltas[layer].shape} in the concept and "
        f"{shapes.get(layer, 'absent')} in the model"
        for layer in concept.layers
        if shapes.get(layer) != concept.deltas[layer].shape
    ]


def check_fit(concept: Concept, family: Family, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises IncompatibleModelError where there are `misfits`."""
    reasons = misfits(concept, family, shapes)
    if not reasons:
        return
    if family != concept.family:
        raise IncompatibleModelError(
            f"The concept {concept.describe()} does not fit: {reasons[0]}. Load a checkpoint of "
            f"{concept.family.title}, or train the concept again on this one."
        )
    raise IncompatibleModelError(
        f"The concept {concept.describe()} does not fit this model in {len(reasons)} of "
        f"{len(concept.deltas)} projections: {reasons[0]}. Load the base model it was trained on."
    )


def check_weight_patches(concept: Concept) -> None:
    """Raises IncompatibleModelError where a part of it cannot be added to a model's weights."""
    beyond = [layer for layer, delta in concept.deltas.items() if not delta.is_weight_patch]
    if beyond:
        raise IncompatibleModelError(
            f"The concept {concept.describe()} changes {len(beyond)} layers otherwise than by "
            f"their weights ({beyond[0]} for one), so it cannot be added to a model or saved as "
            f"weights. Use Route Concepts, which asks it row by row."
        )


def text_remark(concept: Concept, mark: Sequence[float]) -> str:
    """What may show in pictures because a text encoder, known by its `text_mark`, is not the one
    that the concept was made with; empty where it is, or where the concept does not remember.
    """
    made_with = concept.provenance.get(TEXT_MARK)
    if not isinstance(made_with, list) or len(made_with) != len(mark):
        return ""
    if not all(isinstance(number, int | float) for number in made_with):
        return ""
    far = math.dist(mark, made_with) / max(math.hypot(*made_with), 1e-30)
    if not far > _OTHER_TEXT:
        return ""
    return (
        f"{concept.describe()} was made with another text encoder, or at another clip skip: what "
        f"this CLIP makes of '{MARK_PROMPT}' differs by {min(far, 9.99):.0%}, so the concept is "
        f"drawn less exactly at its own words. Use the CLIP that it was made with, and the same "
        f"layer (the node CLIP Set Last Layer), or merge or train again with this one."
    )


def check_text_width(width: int, family: Family) -> None:
    """Raises IncompatibleModelError when a model of the family reads features of another width."""
    if width != family.context_width:
        raise IncompatibleModelError(
            f"The CLIP given makes text features of width {width}; this model is {family.title} "
            f"and reads {family.context_width}. Connect the CLIP of the model's own checkpoint."
        )
