"""Stable Diffusion XL in ComfyUI: its own text encoders and UNet, and diffusers, are the judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import IncompatibleModelError
from custom_diffusion.concept.file import write_concept
from custom_diffusion.concept.fit import check_text_width
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.host.diffusers.denoiser import DiffusersDenoiser
from custom_diffusion.merge.merging import merge_concepts
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.loop import train
from support.comfy_xl import (
    comfy_refiner,
    comfy_refiner_clip,
    comfy_xl_clip,
    comfy_xl_model,
    diffusers_xl_unet,
)
from support.made_concepts import made_concept
from support.tiny_models import (
    RESOLUTION,
    cat_concept,
    dog_concept,
    random_bank,
    sd_scheduler,
    tiny_vae,
)

PROMPTS = ["a dog in the snow", "", "cat! cat"]
SIZES = torch.tensor([[80, 120, 3, 7, 64, 72], [64, 64, 0, 0, 64, 64]])


@pytest.fixture(scope="module")
def model(comfy: Any) -> Any:
    return comfy_xl_model(comfy)


@pytest.fixture(scope="module")
def clip(comfy: Any, embeddings_folder: Path) -> Any:
    return comfy_xl_clip(comfy, [str(embeddings_folder)])


@pytest.fixture(scope="module")
def denoiser(model: Any) -> Any:
    from custom_diffusion.host.comfyui.models.unet import ComfyDenoiser

    with torch.inference_mode():  # as in a node
        return ComfyDenoiser(model, torch.float32)


@pytest.fixture(scope="module")
def encoder(clip: Any) -> Any:
    from custom_diffusion.host.comfyui.models.text import text_encoder

    with torch.inference_mode():
        return text_encoder(clip)


def apply(model: Any, clip: Any, concept: Concept) -> tuple[Any, Any]:
    from custom_diffusion.host.comfyui.apply import apply_concept

    with torch.inference_mode():
        return apply_concept(model, clip, concept, 1.0)


def encode(clip: Any, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        context, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
        return context.clone(), pooled.clone()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    weights = model.model.diffusion_model.named_parameters()
    return {
        name.removesuffix(".weight"): tuple(weight.shape)
        for name, weight in weights
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }


@torch.no_grad()
@pytest.mark.parametrize("skip", [None, -1, -3])
def test_features_and_pooled_equal_comfyuis_own(clip: Any, skip: int | None) -> None:
    from custom_diffusion.host.comfyui.models.text import text_encoder

    if skip is not None:
        clip = clip.clone()
        clip.clip_layer(skip)
    ours = text_encoder(clip)
    for prompt in PROMPTS:
        context, pooled = ours.encode_with_pooled(ours.pad([ours.tokenize(prompt)]))
        own_context, own_pooled = encode(clip, prompt)
        assert difference(context, own_context) < 1e-5
        assert difference(pooled, own_pooled) < 1e-5


@torch.no_grad()
def test_the_prediction_equals_comfyuis_own(model: Any, denoiser: Any) -> None:
    assert denoiser.family is FAMILIES["sdxl"]
    assert len(denoiser.projections) == 24
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 77, 2048, generator=generator)
    pooled = torch.randn(2, 1280, generator=generator)
    timesteps = torch.tensor([17, 801])
    names = "height", "width", "crop_h", "crop_w", "target_height", "target_width"
    y = torch.cat(
        [
            model.model.encode_adm(
                pooled_output=pooled[n : n + 1],
                **dict(zip(names, SIZES[n].tolist(), strict=True)),
            )
            for n in range(2)
        ]
    )
    wanted = model.model.diffusion_model(latents, timesteps.float(), context=context, y=y)
    ours = denoiser.predict(latents, timesteps, context, pooled, SIZES)
    assert difference(ours, wanted) < 1e-5


def test_gradients_equal_those_of_the_diffusers_unet(model: Any, denoiser: Any) -> None:
    twin = DiffusersDenoiser(diffusers_xl_unet(model), sd_scheduler(), tiny_vae())
    assert denoiser.projections.keys() == twin.projections.keys()
    assert difference(denoiser.alphas_cumprod, twin.alphas_cumprod) < 1e-5
    results = []
    for one in (denoiser, twin):
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(2, 4, 8, 8, generator=generator)
        context = torch.randn(2, 77, 2048, generator=generator).requires_grad_(True)
        pooled = torch.randn(2, 1280, generator=generator).requires_grad_(True)
        output = one.predict(latents, torch.tensor([17, 801]), context, pooled, SIZES)
        output.square().mean().backward()
        results.append((output.detach(), context.grad, pooled.grad))
    for ours, theirs in zip(*results, strict=True):
        assert difference(ours, theirs) < 1e-4


@pytest.mark.parametrize("prompt", ["a {} cat", "{}", "a ({} cat:1.2), on a table"])
def test_a_token_means_what_a_stock_embedding_file_means(
    model: Any, clip: Any, embeddings_folder: Path, prompt: str
) -> None:
    concept = made_concept(shapes_of(model), family="sdxl", seed=3)
    write_concept(concept, embeddings_folder / "both.safetensors", torch.float32)
    patched, knowing = apply(model, clip, concept)
    assert len(patched.patches) == 24
    ours = encode(knowing, prompt.format("<new1>"))
    stock = encode(clip, prompt.format(" embedding:both "))
    plain = encode(clip, prompt.format(""))
    for mine, other, without in zip(ours, stock, plain, strict=True):
        assert torch.equal(mine, other)
        assert not torch.equal(mine, without)


def test_features_with_a_token_equal_comfyuis_own(model: Any, clip: Any, encoder: Any) -> None:
    """Both where the word comes with a concept and where the CLIP knows it already."""
    from custom_diffusion.host.comfyui.models.text import text_encoder

    concept = made_concept(shapes_of(model), family="sdxl")
    _, knowing = apply(model, clip, concept)
    own = encode(knowing, "photo of a <new1> cat")
    for ours in (encoder.with_tokens(concept.embeddings()), text_encoder(knowing)):
        with torch.no_grad():
            ids = ours.pad([ours.tokenize("photo of a <new1> cat")])
            features = ours.encode_with_pooled(ids)
        for mine, other in zip(features, own, strict=True):
            assert difference(mine, other) < 1e-5


def test_concepts_are_taught_merged_and_applied(
    model: Any, clip: Any, denoiser: Any, encoder: Any
) -> None:
    settings = TrainConfig(
        method="low-rank", rank=2, steps=2, batch_size=2, resolution=RESOLUTION,
        learning_rate=1e-3, preview_every_steps=1,
    )  # fmt: skip
    events: list[Any] = []
    learnt = [
        train(settings, [one], [random_bank(one)], denoiser, encoder, on_event=events.append)
        for one in (cat_concept(), dog_concept())
    ]
    assert sum(hasattr(event, "image_hwc") for event in events) == 4
    merged, report = merge_concepts(learnt, encoder, captions=["a cat", "two red houses"])
    assert max(report.residuals) < 0.01 or report.damped
    patched, knowing = apply(model, clip, merged)
    assert len(patched.patches) == 24
    assert not torch.equal(
        encode(knowing, "a <new1> cat and a <new2> dog")[0], encode(clip, "a cat and a dog")[0]
    )


def test_the_refiner_and_other_variants_are_refused(comfy: Any) -> None:
    from custom_diffusion.host.comfyui.models.text import text_encoder
    from custom_diffusion.host.comfyui.models.unet import ComfyDenoiser

    for variant, message in (
        (comfy_refiner(comfy), "width 1280; known families are"),
        (comfy_xl_model(comfy, in_channels=9), "ordinary text-to-image model.* 9 input channels"),
        (
            comfy_xl_model(comfy, adm_in_channels=2560),
            "2560 numbers beside the text instead of 2816",
        ),
    ):
        with pytest.raises(IncompatibleModelError, match=message):
            ComfyDenoiser(variant, torch.float32)
    with pytest.raises(IncompatibleModelError, match="This CLIP is a SDXLRefinerClipModel; needed"):
        text_encoder(comfy_refiner_clip(comfy))


def test_a_clip_of_another_model_is_refused(encoder: Any) -> None:
    check_text_width(encoder.context_width, FAMILIES["sdxl"])
    with pytest.raises(
        IncompatibleModelError, match=r"width 2048; this model is .* 1\.x and reads"
    ):
        check_text_width(encoder.context_width, FAMILIES["sd15"])
