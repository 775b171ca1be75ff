"""Whether a concept fits a MODEL of ComfyUI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import IncompatibleModelError
from custom_diffusion.concept.fit import Fit
from support.made_concepts import made_concept

LAYER = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"


def fit(concept: Concept, model: Any) -> Fit:
    from custom_diffusion.host.comfyui.inspection import fit_to_model

    with torch.inference_mode():
        return fit_to_model(concept, model)


def test_a_concept_of_the_model_fits_and_knows_its_checkpoint(sd15: Any) -> None:
    """As long as the model is as it was when the training took its hash."""
    from custom_diffusion.host.comfyui.apply import apply_concept
    from custom_diffusion.host.comfyui.models.unet import ComfyDenoiser
    from custom_diffusion.trainer.learning.projections import base_hash

    concept = made_concept({LAYER: (320, 768)})
    assert fit(concept, sd15.model) == Fit()
    own = replace(concept, base_hash=base_hash(ComfyDenoiser(sd15.model, torch.float32)))
    assert fit(own, sd15.model) == Fit()
    with torch.inference_mode():
        patched, _ = apply_concept(sd15.model, sd15.clip, concept, 1.0)
    found = fit(own, patched)
    assert not found.misfits and "another checkpoint" in found.remark


def test_why_a_concept_does_not_fit(sd15: Any, load: Callable[[str], Any]) -> None:
    layers = {LAYER: (320, 768), LAYER.replace("1.1", "3.1"): (320, 768)}
    (reason,) = fit(made_concept(layers), sd15.model).misfits
    assert "input_blocks.3.1" in reason and "absent in the model" in reason
    sdxl = made_concept({LAYER.replace("1.1", "4.1"): (640, 2048)}, family="sdxl")
    (reason,) = fit(sdxl, sd15.model).misfits
    assert "trained on Stable Diffusion XL" in reason
    (reason,) = fit(made_concept({LAYER: (320, 768)}), load("dit").model).misfits
    assert "no cross-attention" in reason


def test_two_models_are_compared_with_their_patches(sd15: Any, load: Callable[[str], Any]) -> None:
    from custom_diffusion.host.comfyui.apply import apply_concept
    from custom_diffusion.host.comfyui.inspection import compare_models

    concept = made_concept({LAYER: (320, 768)})
    with torch.inference_mode():
        patched, _ = apply_concept(sd15.model, sd15.clip, concept, 0.5)
        found, plot = compare_models(sd15.model, patched)
        same, _ = compare_models(sd15.model, sd15.model)
    (changed,) = [one for one in found.changes if one.change]
    assert changed.name == f"{LAYER}.weight" and found.alone == 0
    weight = sd15.model.model.diffusion_model.get_parameter(changed.name).float()
    wanted = 0.5 * concept.deltas[LAYER].dense().norm() / weight.norm()
    assert changed.change == pytest.approx(float(wanted), rel=1e-2)
    assert plot.shape[0] == 1 and plot.shape[-1] == 3
    assert same.summary()[0].startswith("The same")
    with pytest.raises(IncompatibleModelError), torch.inference_mode():
        compare_models(sd15.model, load("dit").model)
