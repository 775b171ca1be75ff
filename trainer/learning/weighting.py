"""What a timestep's loss counts, and which timesteps and noise a training draws.

With SNR_t = ᾱ_t / (1 − ᾱ_t), a loss on the noise ε has the weight w(t), and a loss on the velocity
v has w(t) SNR_t / (SNR_t + 1) = w(t) ᾱ_t: at the same x_t the error of ε is √ᾱ_t times that of v.

- min-SNR (Hang et al., ICCV 2023): w = min(SNR_t, γ) / SNR_t.
- debiased (Yu et al., 2023, arXiv 2310.08442): w = 1 / √SNR_t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...concept.errors import ConfigError
from ..config import TrainConfig
from ..options import LossWeighting

_LEAST_SNR = 1e-8
"""The end of a schedule of zero terminal SNR, where all that is left of a weight on v is 0"""


def loss_weights(
    config: TrainConfig, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: str
) -> Tensor | None:
    """(b,) of timesteps (b,); None where all count alike. Raises ConfigError for a model that
    predicts neither noise nor velocity, as flow models do: there is no ᾱ_t.
    """
    if config.loss_weighting == "none":
        return None
    if prediction_type not in ("epsilon", "v"):
        raise ConfigError(
            f"loss_weighting={config.loss_weighting!r} is made for models that predict noise or "
            f"velocity at the noise levels of Stable Diffusion; this one predicts "
            f"{prediction_type!r}. Set loss_weighting to 'none'."
        )
    alphas = alphas_cumprod.double()[timesteps.cpu()]
    snr = (alphas / (1 - alphas)).clamp_min(_LEAST_SNR)
    weights = _ON_NOISE[config.loss_weighting](snr, config.min_snr_gamma)
    if prediction_type == "v":
        weights = weights * snr / (snr + 1)
    return weights.float()


_ON_NOISE: Mapping[LossWeighting, Callable[[Tensor, float], Tensor]] = {
    "min-snr": lambda snr, gamma: snr.clamp_max(gamma) / snr,
    "debiased": lambda snr, gamma: snr.rsqrt(),
}
"""The weight on a loss on ε"""


def drawn_timesteps(
    config: TrainConfig, count: int, schedule: int, generator: torch.Generator
) -> Tensor:
    """Uniform over the part of a schedule of so many timesteps that the settings leave."""
    last = min(config.max_timestep, schedule - 1)
    return torch.randint(min(config.min_timestep, last), last + 1, (count,), generator=generator)


def offset(noise: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """Noise whose channels are moved as a whole, too (Guttenberg 2023, Diffusion with Offset
    Noise): ε + o ξ with one ξ of N(0, 1) for each sample and channel.
    """
    if not config.noise_offset:
        return noise
    moved = torch.randn(*noise.shape[:2], 1, 1, generator=generator)
    return noise + config.noise_offset * moved


def check_timesteps(config: TrainConfig) -> None:
    """Raises ConfigError where the settings leave no timestep."""
    if config.min_timestep > config.max_timestep:
        raise ConfigError(
            f"min_timestep={config.min_timestep} is above max_timestep={config.max_timestep}, so "
            f"there is none to train on. Swap them; 0 and 999 are all of them."
        )
