"""A UNet in ComfyUI's scaled float8: its matrices are numbers in 8 bits, each with a scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.loop import train
from support.made_concepts import made_concept
from support.tiny_models import RESOLUTION, cat_concept, random_bank

PREFIX = "diffusion_model."


@pytest.fixture(scope="module")
def scaled(load: Callable[[str], Any]) -> Any:
    return load("sd15_scaled_float8")


def test_it_predicts_what_comfyui_does(comfy: Any, scaled: Any, sd15: Any) -> None:
    from custom_diffusion.host.comfyui.models.unet import ComfyDenoiser

    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=draw)
    context = torch.randn(2, 77, 768, generator=draw)
    times = torch.tensor([10, 700])

    def comfyuis(model: Any) -> torch.Tensor:
        comfy.model_management.load_models_gpu([model])
        with torch.inference_mode():
            network = model.model.diffusion_model
            return network(latents, times.float(), context=context).clone()  # type: ignore[no-any-return]

    wanted, whole = comfyuis(scaled.model), comfyuis(sd15.model)
    found = ComfyDenoiser(scaled.model, torch.float32).predict(latents, times, context)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (found - whole).norm() > 0.01 * whole.norm(), "8 bits are not 16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_can_be_trained_on(scaled: Any, dtype: torch.dtype) -> None:
    from custom_diffusion.host.comfyui.models.text import text_encoder
    from custom_diffusion.host.comfyui.models.unet import ComfyDenoiser

    denoiser = ComfyDenoiser(scaled.model, dtype, keep_float8=True)
    concept = cat_concept(2)
    config = TrainConfig(steps=2, batch_size=2, resolution=RESOLUTION, preview_every_steps=0)
    encoder = text_encoder(scaled.clip)
    learnt = train(config, [concept], [random_bank(concept)], denoiser, encoder)
    assert all(delta.dense().any() for delta in learnt.deltas.values())


def test_a_concept_is_added_to_what_the_numbers_stand_for(scaled: Any, shapes: Any) -> None:
    from custom_diffusion.host.comfyui.apply import apply_concept
    from custom_diffusion.host.comfyui.inspection import fit_to_model
    from custom_diffusion.host.comfyui.models.weights import patched_weights

    concept = made_concept(shapes)
    with torch.inference_mode():
        applied, _ = apply_concept(scaled.model, scaled.clip, concept, 0.7)
    base, changed = (patched_weights(model, PREFIX) for model in (scaled.model, applied))
    for layer, delta in concept.deltas.items():
        found = changed[f"{layer}.weight"].float() - base[f"{layer}.weight"].float()
        torch.testing.assert_close(found, 0.7 * delta.dense(), atol=1e-3, rtol=1e-3)
    assert fit_to_model(concept, scaled.model).misfits == ()
