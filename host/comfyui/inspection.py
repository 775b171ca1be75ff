"""How a concept suits ComfyUI's loaded model, and in what two models differ."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...concept.concept import Concept
from ...concept.errors import IncompatibleModelError
from ...concept.fit import Fit, fit_to
from ...inspection.weight_change import WeightChanges
from ...pictures.tensors import to_tensor
from .models.weights import base_model, shared_weights


def fit_to_model(concept: Concept, model: Any) -> Fit:
    """Of a MODEL as it is, with its patches. A model that no concept fits is no error here."""
    try:
        base = base_model(model)
        family = base.family
    except IncompatibleModelError as error:
        return Fit((str(error),))
    shapes = {layer: tuple(weight.shape) for layer, weight in base.weights.items()}
    return fit_to(concept, family, shapes, base.hash)


def compare_models(before: Any, after: Any) -> tuple[WeightChanges, Tensor]:
    """How the weights of two MODELs differ, patches included, and a plot (1, h, w, 3) of it."""
    names = [
        {key for key, _ in one.model.named_parameters() if key.startswith("diffusion_model.")}
        for one in (before, after)
    ]
    found = WeightChanges.of(shared_weights(before, after), len(names[0] ^ names[1]))
    return found, to_tensor(found.plot())[None]
