"""Noise, targets and losses against diffusers and against plain loops; the preview sampler."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from custom_diffusion.concept.text import TextFeatures
from custom_diffusion.diffusion.noise import add_noise, denoised, target
from custom_diffusion.diffusion.protocols import PredictionType
from custom_diffusion.diffusion.sampling import ddim_sample
from custom_diffusion.trainer.learning.objective import sample_losses, sample_weights
from support.tiny_models import sd_scheduler
from torch import Tensor

SCHEDULER = sd_scheduler()
ALPHAS = SCHEDULER.alphas_cumprod
TIMESTEPS = torch.tensor([0, 1, 250, 500, 998, 999])


def latents_and_noise(count: int = len(TIMESTEPS)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, count, 4, 8, 8, generator=generator)
    return latents, noise


def test_noise_is_added_as_diffusers_adds_it() -> None:
    latents, noise = latents_and_noise()
    ours = add_noise(latents, noise, TIMESTEPS, ALPHAS)
    torch.testing.assert_close(
        ours, SCHEDULER.add_noise(latents, noise, TIMESTEPS), atol=1e-6, rtol=1e-6
    )


def test_the_target_is_the_noise_for_epsilon() -> None:
    latents, noise = latents_and_noise()
    assert torch.equal(target(latents, noise, TIMESTEPS, ALPHAS, "epsilon"), noise)


def test_the_target_is_the_velocity_of_diffusers_for_v() -> None:
    latents, noise = latents_and_noise()
    torch.testing.assert_close(
        target(latents, noise, TIMESTEPS, ALPHAS, "v"),
        SCHEDULER.get_velocity(latents, noise, TIMESTEPS),
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize("prediction", get_args(PredictionType))
def test_denoising_with_the_target_gives_back_latents_and_noise(prediction: PredictionType) -> None:
    latents, noise = (t.double() for t in latents_and_noise())
    alphas = ALPHAS.double()
    noisy = add_noise(latents, noise, TIMESTEPS, alphas)
    wanted = target(latents, noise, TIMESTEPS, alphas, prediction)
    clean, found_noise = denoised(noisy, wanted, TIMESTEPS, alphas, prediction)
    torch.testing.assert_close(clean, latents, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found_noise, noise, atol=1e-9, rtol=1e-9)


def test_masked_losses_equal_a_plain_loop() -> None:
    prediction, wanted = latents_and_noise(3)
    masks = torch.zeros(3, 8, 8)
    masks[0] = 1
    masks[1, 2:5, 1:7] = 1
    masks[2, 7, 7] = 1
    expected = []
    for sample in range(3):
        total, cells = 0.0, 0
        for row in range(8):
            for column in range(8):
                if masks[sample, row, column]:
                    cells += 1
                    for channel in range(4):
                        at = sample, channel, row, column
                        total += float(prediction[at] - wanted[at]) ** 2
        expected.append(total / (4 * cells))
    np.testing.assert_allclose(sample_losses(prediction, wanted, masks), expected, rtol=1e-5)


def test_a_full_mask_gives_the_mean_squared_error() -> None:
    prediction, wanted = latents_and_noise(2)
    losses = sample_losses(prediction, wanted, torch.ones(2, 8, 8))
    expected = [torch.nn.functional.mse_loss(p, w) for p, w in zip(prediction, wanted, strict=True)]
    torch.testing.assert_close(losses, torch.stack(expected))


def test_what_lies_outside_the_mask_has_no_loss_and_no_gradient() -> None:
    prediction, wanted = latents_and_noise(1)
    prediction = prediction.clone().requires_grad_(True)
    masks = torch.zeros(1, 8, 8)
    masks[:, 2:4, 2:4] = 1
    sample_losses(prediction, wanted, masks).sum().backward()
    assert prediction.grad is not None
    assert (prediction.grad[:, :, 2:4, 2:4] != 0).all()
    assert torch.count_nonzero(prediction.grad) == 4 * 4


def test_losses_of_half_precision_predictions_are_float32() -> None:
    prediction, wanted = latents_and_noise(1)
    losses = sample_losses(100 * prediction.half(), wanted.half(), torch.ones(1, 8, 8))
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()


def test_an_empty_mask_gives_zero_instead_of_nan() -> None:
    prediction, wanted = latents_and_noise(1)
    assert sample_losses(prediction, wanted, torch.zeros(1, 8, 8)).item() == 0


def test_the_loss_is_the_mean_of_the_instances_without_regularization() -> None:
    loss = sample_weights(3, 0, 5.0) @ torch.tensor([1.0, 2.0, 6.0])
    assert loss.item() == pytest.approx(3.0)


@pytest.mark.parametrize("weight, expected", [(0.0, 2.0), (1.0, 9.0), (0.5, 5.5)])
def test_regularization_counts_with_its_weight_and_apart_from_the_instances(
    weight: float, expected: float
) -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 6.0, 8.0])
    assert (sample_weights(5, 2, weight) @ losses).item() == pytest.approx(expected)


@pytest.mark.parametrize("prediction", get_args(PredictionType))
@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_previews_end_at_the_latents_that_a_perfect_network_knows(
    prediction: PredictionType, guidance: float
) -> None:
    latents, noise = latents_and_noise(2)

    def perfect(
        noisy: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor | None, sizes: Tensor
    ) -> Tensor:
        assert len(noisy) == len(timesteps) == len(context) == len(sizes) == 4
        assert pooled is None
        known = torch.cat([latents, latents])
        alpha = ALPHAS[timesteps].view(-1, 1, 1, 1)
        epsilon = (noisy - alpha.sqrt() * known) / (1 - alpha).sqrt()
        return target(known, epsilon, timesteps, ALPHAS, prediction)

    text = TextFeatures(torch.zeros(2, 77, 768))
    drawn = ddim_sample(perfect, noise, text, text, ALPHAS, prediction, guidance=guidance)
    # One thousandth of the variance is noise at the first step of the schedule.
    assert (drawn - latents).abs().mean() < 0.05


def test_guidance_leads_from_the_empty_prompt_towards_the_prompt() -> None:
    _, noise = latents_and_noise(1)
    seen: list[Tensor] = []

    def network(noisy: Tensor, timesteps: Tensor, context: Tensor, *_: Tensor | None) -> Tensor:
        seen.append(noisy)
        return context.mean((1, 2)).view(-1, 1, 1, 1).expand_as(noisy)

    prompt, empty = (TextFeatures(torch.full((1, 77, 8), value)) for value in (0.3, 0.1))
    drawn = ddim_sample(network, noise, prompt, empty, ALPHAS, "epsilon", steps=1, guidance=3.0)
    output = torch.full_like(noise, 0.1 + 3.0 * 0.2)
    clean, _ = denoised(noise, output, torch.tensor([999]), ALPHAS, "epsilon")
    expected = ALPHAS[0].sqrt() * clean + (1 - ALPHAS[0]).sqrt() * output
    torch.testing.assert_close(drawn, expected)
    assert len(seen) == 1
