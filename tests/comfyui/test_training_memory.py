"""What a training of ComfyUI's UNet needs less memory by, and that it computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.economy.cpu_attention import cpu_attention
from custom_diffusion.trainer.economy.frozen_layers import keeping_less
from custom_diffusion.trainer.learning.projections import DenseProjections
from custom_diffusion.trainer.loop import train
from support.kept import kept_bytes
from support.tiny_models import RESOLUTION, cat_concept, random_bank
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def float8_model(comfy: Any, checkpoint_file: Callable[[str], Path]) -> Any:
    """As UNETLoader gives it with the weight type fp8_e4m3fn."""
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(
            str(checkpoint_file("sd15_wide")), output_clip=False, model_options={"dtype": FLOAT8}
        )[0]


def prediction_and_gradient(denoiser: Any, edge: int = 8) -> tuple[Tensor, Tensor, int]:
    """Of two latents, with the gradient of all keys and values; and what was kept."""
    projections = DenseProjections(denoiser, {})
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, edge, edge, generator=draw)
    context = torch.randn(2, 77, 768, generator=draw)
    weights = [*denoiser.network.parameters(), projections.weight]
    with projections.installed(), kept_bytes(weights) as kept:
        out = projections.predict(latents, torch.tensor([10, 700]), context)
    out.square().sum().backward()
    assert projections.weight.grad is not None
    return out.detach(), projections.weight.grad, kept[0]


def test_comfyuis_unet_keeps_less_for_the_same_numbers(sd15: Any) -> None:
    from custom_diffusion.host.comfyui.models.unet import ComfyDenoiser

    denoiser = ComfyDenoiser(sd15.model, torch.bfloat16)
    whole = prediction_and_gradient(denoiser)
    with keeping_less(denoiser.network):
        less = prediction_and_gradient(denoiser)
    assert torch.equal(less[0], whole[0])
    assert torch.equal(less[1], whole[1])
    assert less[2] < 0.7 * whole[2]


def test_our_attention_in_comfyuis_unet_is_nearly_as_exact_and_keeps_no_more(sd15: Any) -> None:
    from custom_diffusion.host.comfyui.models.unet import ComfyDenoiser

    exact = prediction_and_gradient(ComfyDenoiser(sd15.model, torch.float32), edge=32)
    denoiser = ComfyDenoiser(sd15.model, torch.bfloat16)
    pytorchs = prediction_and_gradient(denoiser, edge=32)
    with cpu_attention(denoiser.network):
        ours = prediction_and_gradient(denoiser, edge=32)
    for found, other, wanted in zip(ours[:2], pytorchs[:2], exact[:2], strict=True):
        assert not torch.equal(found, other)
        assert (found - wanted).norm() < 1.1 * (other - wanted).norm()
    assert ours[2] <= pytorchs[2]


def test_half_precision_computes_what_float32_does_but_for_rounding(sd15: Any) -> None:
    """As on a GPU with bfloat16: UNet, text encoder, and channels last, which 256 px bring."""
    from custom_diffusion.host.comfyui.models.text import text_encoder
    from custom_diffusion.host.comfyui.models.unet import ComfyDenoiser

    prompt = "photo of a cat in the rain"
    ((wanted, _),) = sd15.clip.encode_from_tokens_scheduled(sd15.clip.tokenize(prompt))
    concept = cat_concept(2)
    config = TrainConfig(steps=3, batch_size=2, resolution=256, preview_every_steps=0)
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        denoiser, encoder = ComfyDenoiser(sd15.model, dtype), text_encoder(sd15.clip)
        encoder.to(torch.device("cpu"), dtype)
        features = encoder.encode(encoder.pad([encoder.tokenize(prompt)]))
        most = 0.01 if dtype == torch.bfloat16 else 1e-5
        assert (features - wanted).norm() < most * wanted.norm()
        learnt = train(config, [concept], [random_bank(concept)], denoiser, encoder)
        losses[dtype] = learnt.provenance["final_losses"]
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.02)
    assert losses[torch.bfloat16] != losses[torch.float32]


def test_weights_in_eight_bits_stay_so_and_train_as_if_they_were_cast(float8_model: Any) -> None:
    from custom_diffusion.host.comfyui.models.unet import ComfyDenoiser

    cast = ComfyDenoiser(float8_model, torch.bfloat16)
    small = ComfyDenoiser(float8_model, torch.bfloat16, keep_float8=True)
    sizes = [sum(p.nbytes for p in d.network.parameters()) for d in (small, cast)]
    assert sizes[0] < 0.52 * sizes[1]
    assert {p.dtype for p in small.network.parameters() if p.ndim == 1} == {torch.bfloat16}
    with keeping_less(cast.network):
        wanted = prediction_and_gradient(cast)
    with keeping_less(small.network):
        found = prediction_and_gradient(small)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert found[2] == wanted[2], "casts are not kept"


def test_a_training_on_eight_bits_learns(float8_model: Any, sd15: Any) -> None:
    from custom_diffusion.host.comfyui.models.text import text_encoder
    from custom_diffusion.host.comfyui.models.unet import ComfyDenoiser

    denoiser = ComfyDenoiser(float8_model, torch.bfloat16, keep_float8=True)
    concept = cat_concept(2)
    config = TrainConfig(steps=2, batch_size=2, resolution=RESOLUTION, preview_every_steps=0)
    bank = random_bank(concept)
    learnt = train(config, [concept], [bank], denoiser, text_encoder(sd15.clip))
    assert all(delta.dense().any() for delta in learnt.deltas.values())
    assert learnt.base_hash
    assert all("forward" not in vars(part) for part in denoiser.network.modules())
