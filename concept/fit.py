"""Whether a concept belongs on a model: the one check that every host makes before applying one."""

from collections.abc import Mapping

from .concept import Concept
from .errors import IncompatibleModelError
from .layers import Family


def check_text_width(width: int, family: Family) -> None:
    """Raises IncompatibleModelError when a model of the family reads features of another width."""
    if width != family.context_width:
        raise IncompatibleModelError(
            f"The CLIP given makes text features of width {width}; this model is {family.title} "
            f"and reads {family.context_width}. Connect the CLIP of the model's own checkpoint."
        )


def check_fit(concept: Concept, family: Family, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises IncompatibleModelError unless the model has every projection that the concept changes.

    `shapes` are the model's weights by layer name, (out, in).
    """
    if family != concept.family:
        raise IncompatibleModelError(
            f"The concept {concept.describe()} was trained on {concept.family.title} (text width "
            f"{concept.family.context_width}); this model is {family.title} "
            f"({family.context_width}). Load a checkpoint of {concept.family.title}, or train the "
            f"concept again on this one."
        )
    wrong = [layer for layer in concept.layers if shapes.get(layer) != concept.deltas[layer].shape]
    if wrong:
        layer = wrong[0]
        raise IncompatibleModelError(
            f"The concept {concept.describe()} does not fit this model in {len(wrong)} of "
            f"{len(concept.deltas)} projections: {layer} is {concept.deltas[layer].shape} in the "
            f"concept and {shapes.get(layer, 'absent')} in the model. Load the base model it was "
            f"trained on."
        )
