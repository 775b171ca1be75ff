"""How a concept suits ComfyUI's loaded model."""

from __future__ import annotations

from typing import Any

from ...concept.concept import Concept
from ...concept.errors import IncompatibleModelError
from ...concept.fit import Fit, fit_to
from .models.weights import base_model


def fit_to_model(concept: Concept, model: Any) -> Fit:
    """Of a MODEL as it is, with its patches. A model that no concept fits is no error here."""
    try:
        base = base_model(model)
        family = base.family
    except IncompatibleModelError as error:
        return Fit((str(error),))
    shapes = {layer: tuple(weight.shape) for layer, weight in base.weights.items()}
    return fit_to(concept, family, shapes, base.hash)
