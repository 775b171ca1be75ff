"""What timesteps count, against the papers' formulas and diffusers' own SNR; what is drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from custom_diffusion.concept.errors import ConfigError
from custom_diffusion.concept.text import TextFeatures
from custom_diffusion.host.diffusers.lending import DiffusersModels, borrowed_models
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.data.batches import Batch
from custom_diffusion.trainer.learning.prompt_features import PromptText
from custom_diffusion.trainer.learning.samples import drawn_noise, samples_of
from custom_diffusion.trainer.learning.weighting import (
    check_timesteps,
    drawn_timesteps,
    loss_weights,
    offset,
)
from diffusers.training_utils import compute_snr
from support.tiny_models import sd_scheduler, tiny_pipeline

SCHEDULER = sd_scheduler()
ALPHAS = SCHEDULER.alphas_cumprod
TIMESTEPS = torch.tensor([0, 3, 250, 500, 998, 999])
SNR = compute_snr(SCHEDULER, TIMESTEPS).double()


def test_min_snr_is_that_of_diffusers_training_scripts() -> None:
    """min(SNR, γ) / SNR on noise, min(SNR, γ) / (SNR + 1) on velocity."""
    for gamma in (1.0, 5.0):
        config = TrainConfig(loss_weighting="min-snr", min_snr_gamma=gamma)
        least = torch.stack([SNR, gamma * torch.ones_like(SNR)], dim=1).min(dim=1)[0]
        for prediction, below in (("epsilon", SNR), ("v", SNR + 1)):
            found = loss_weights(config, TIMESTEPS, ALPHAS, prediction)
            assert found is not None
            torch.testing.assert_close(found.double(), least / below, rtol=1e-4, atol=0)


def test_debiased_is_one_over_the_root_whatever_is_predicted() -> None:
    """Of an error of the noise: an error of v is that of the noise over √ᾱ, so the weighted losses
    of one and the same error are equal.
    """
    config = TrainConfig(loss_weighting="debiased")
    on_noise = loss_weights(config, TIMESTEPS, ALPHAS, "epsilon")
    on_velocity = loss_weights(config, TIMESTEPS, ALPHAS, "v")
    assert on_noise is not None and on_velocity is not None
    torch.testing.assert_close(on_noise.double(), SNR**-0.5, rtol=1e-4, atol=0)
    error = torch.randn(6)
    of_velocity = error / ALPHAS[TIMESTEPS].sqrt()
    losses = on_noise * error.square(), on_velocity * of_velocity.square()
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)


def test_zero_terminal_snr_gives_numbers() -> None:
    alphas = torch.linspace(0.999, 0, 1000)
    for weighting in ("min-snr", "debiased"):
        config = TrainConfig(loss_weighting=weighting)  # type: ignore[arg-type]
        found = loss_weights(config, torch.tensor([0, 500, 999]), alphas, "v")
        assert found is not None and found.isfinite().all() and found[-1] < 1e-3


def test_off_means_nothing_and_a_flow_model_is_refused() -> None:
    assert loss_weights(TrainConfig(), TIMESTEPS, ALPHAS, "flow") is None
    with pytest.raises(ConfigError, match="'min-snr' is made for .* predicts 'flow'"):
        loss_weights(TrainConfig(loss_weighting="min-snr"), TIMESTEPS, ALPHAS, "flow")


def test_timesteps_stay_in_their_range_and_are_as_ever_without_one() -> None:
    def draw(config: TrainConfig) -> torch.Tensor:
        return drawn_timesteps(config, 2000, 1000, torch.Generator().manual_seed(0))

    as_ever = torch.randint(1000, (2000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(TrainConfig()), as_ever)
    some = draw(TrainConfig(min_timestep=100, max_timestep=119))
    assert set(some.tolist()) == set(range(100, 120))
    with pytest.raises(ConfigError, match="min_timestep=5 is above max_timestep=4"):
        check_timesteps(TrainConfig(min_timestep=5, max_timestep=4))


def test_noise_is_moved_by_channel() -> None:
    noise = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    assert offset(noise, TrainConfig(), draw) is noise
    moved = offset(noise, TrainConfig(noise_offset=0.5), draw) - noise
    assert (moved - moved[:, :, :1, :1]).abs().max() < 1e-6
    assert 0.4 < float(moved[:, :, 0, 0].std()) < 0.6


@pytest.fixture(scope="module")
def models() -> DiffusersModels:
    with borrowed_models(tiny_pipeline()) as lent:
        return lent


def test_a_step_counts_its_samples_so(models: DiffusersModels) -> None:
    batch = Batch(
        latents_bchw=torch.randn(4, 4, 8, 8),
        masks_bhw=torch.ones(4, 8, 8),
        prompts=("a", "b", "c", "d"),
        sizes=torch.zeros(4, 6),
        prior=2,
    )
    config = TrainConfig(loss_weighting="min-snr", noise_offset=0.1, prior_weight=0.5)
    text = PromptText(TextFeatures(torch.zeros(4, 77, 8)), None, None)
    drawn = drawn_noise(batch, torch.Generator().manual_seed(0), models.denoiser, config)
    weighted, plain = (
        samples_of(batch, *drawn, text, models.denoiser, settings)
        for settings in (config, replace(config, loss_weighting="none"))
    )
    wanted = loss_weights(config, drawn[1], models.denoiser.alphas_cumprod, "epsilon")
    assert wanted is not None
    torch.testing.assert_close(weighted.weights, plain.weights * wanted)
    assert torch.equal(plain.weights, torch.tensor([0.5, 0.5, 0.25, 0.25]))
