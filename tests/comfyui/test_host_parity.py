"""The same weights in ComfyUI and in diffusers give the same features, losses and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.diffusion.noise import add_noise, target
from custom_diffusion.host.diffusers.lending import borrowed_models
from custom_diffusion.trainer.learning.objective import sample_losses, sample_weights
from custom_diffusion.trainer.learning.projections import DenseProjections
from support.diffusers_twin import diffusers_twin

PROMPTS = ["photo of a <new1> cat", "very small photo of a <new1> cat", "a dog in the snow", ""]
LIMIT = 1e-4


@pytest.fixture(scope="module", params=["sd15", "sd2_v"])
def hosts(request: Any, load: Any, checkpoint_file: Callable[[str], Path]) -> Any:
    """(denoiser, text encoder, latent encoder) of both hosts."""
    from custom_diffusion.host.comfyui.models.text import text_encoder
    from custom_diffusion.host.comfyui.models.unet import ComfyDenoiser, ComfyLatentEncoder

    loaded = load(request.param)
    encoder = text_encoder(loaded.clip)
    with torch.inference_mode():  # as in a node
        ours = (
            ComfyDenoiser(loaded.model, torch.float32),
            encoder,
            ComfyLatentEncoder(loaded.vae, loaded.model.model.latent_format.scale_factor),
        )
    sd2 = request.param != "sd15"
    tokenizer = getattr(loaded.clip.tokenizer, "clip_h" if sd2 else "clip_l").tokenizer
    pipeline = diffusers_twin(checkpoint_file(request.param), tokenizer, v_prediction=sd2)
    pipeline.tokenizer.pad_token = "!" if sd2 else "<|endoftext|>"
    with borrowed_models(pipeline) as models:
        yield ours, (models.denoiser, models.text_encoder, models.latent_encoder)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def with_word(encoder: Any, row: torch.Tensor) -> Any:
    return encoder.with_tokens({encoder.name: {"<new1>": row}})


@torch.no_grad()
def test_text_features_agree(hosts: Any) -> None:
    (_, ours, _), (_, theirs, _) = hosts
    row = ours.vocabulary_row(2368)[ours.name]
    features = [
        with_word(encoder, row).encode(
            encoder.pad([with_word(encoder, row).tokenize(p) for p in PROMPTS])
        )
        for encoder in (ours, theirs)
    ]
    assert difference(*features) < 1e-5


@torch.no_grad()
def test_text_features_equal_comfyuis_own(hosts: Any, load: Any, request: Any) -> None:
    (_, ours, _), _ = hosts
    clip = load("sd15" if ours.context_width == 768 else "sd2_v").clip
    for prompt in PROMPTS[2:]:
        own = clip.encode_from_tokens(clip.tokenize(prompt))
        assert difference(ours.encode(ours.pad([ours.tokenize(prompt)])), own) < 1e-5


@torch.no_grad()
def test_clip_skip_is_respected(comfy: Any, load: Any) -> None:
    from custom_diffusion.host.comfyui.models.text import text_encoder

    clip = load("sd15").clip.clone()
    clip.clip_layer(-2)
    ours = text_encoder(clip)
    own = clip.encode_from_tokens(clip.tokenize("a dog in the snow"))
    assert difference(ours.encode(ours.pad([ours.tokenize("a dog in the snow")])), own) < 1e-5


@torch.no_grad()
def test_latents_agree(hosts: Any) -> None:
    (_, _, ours), (_, _, theirs) = hosts
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for mine, other in zip(ours.moments(image), theirs.moments(image), strict=True):
        assert difference(mine, other) < LIMIT


@pytest.mark.parametrize(
    ("hosts", "shape"),
    [("sd15", (8, 8)), ("sd15", (24, 8)), ("sd2_v", (8, 8))],  # shapes pass one network of both
    indirect=["hosts"],
)
def test_loss_and_gradients_of_a_training_step_agree(hosts: Any, shape: tuple[int, int]) -> None:
    (comfy_denoiser, comfy_text, _), (denoiser, text, _) = hosts
    assert comfy_denoiser.prediction_type == denoiser.prediction_type
    assert difference(comfy_denoiser.alphas_cumprod, denoiser.alphas_cumprod) < 1e-5

    loss, weight, row, base_hash = one_step(comfy_denoiser, comfy_text, shape)
    other_loss, other_weight, other_row, other_hash = one_step(denoiser, text, shape)

    print(
        f"host parity ({denoiser.family.name}): loss {abs(loss - other_loss) / other_loss:.1e}, "
        f"K/V gradient {difference(weight, other_weight):.1e}, "
        f"token gradient {difference(row, other_row):.1e}"
    )
    assert base_hash == other_hash
    assert abs(loss - other_loss) < LIMIT * other_loss
    assert difference(weight, other_weight) < LIMIT
    assert difference(row, other_row) < LIMIT


def one_step(
    denoiser: Any, encoder: Any, shape: tuple[int, int]
) -> tuple[float, torch.Tensor, torch.Tensor, str]:
    """Loss, gradient of all keys and values, gradient of V*, and the base model's hash."""
    generator = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(4, 4, *shape, generator=generator) for _ in range(2))
    timesteps = torch.tensor([17, 400, 700, 981])
    masks = (torch.rand(4, *shape, generator=generator) > 0.3).float()
    row = torch.nn.Parameter(encoder.vocabulary_row(42170)[encoder.name])

    words = with_word(encoder, row)
    context = words.encode(words.pad([words.tokenize(prompt) for prompt in PROMPTS]))
    keep = torch.ones(context.shape[:2])
    keep[:, 0] = 0
    projections = DenseProjections(denoiser, {})
    with projections.installed():
        noisy = add_noise(latents, noise, timesteps, denoiser.alphas_cumprod)
        prediction = projections.predict(noisy, timesteps, context, passing=keep)
        schedule = denoiser.alphas_cumprod
        wanted = target(latents, noise, timesteps, schedule, denoiser.prediction_type)
        loss = sample_weights(4, 2, 1.0) @ sample_losses(prediction, wanted, masks)
        loss.backward()
    assert projections.weight.grad is not None and row.grad is not None
    return float(loss.detach()), projections.weight.grad, row.grad, projections.base_hash
