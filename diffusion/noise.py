"""Noise: how it is added, what a network should predict of it, and what an output stands for."""

from torch import Tensor

from .protocols import PredictionType


def add_noise(
    latents_bchw: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε"""
    signal, sigma = _signal_and_noise(timesteps, alphas_cumprod, latents_bchw)
    return signal * latents_bchw + sigma * noise


def target(
    latents_bchw: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: PredictionType,
) -> Tensor:
    """What the network should predict: ε, or v = √ᾱ_t ε − √(1 − ᾱ_t) x_0."""
    if prediction_type == "epsilon":
        return noise
    signal, sigma = _signal_and_noise(timesteps, alphas_cumprod, latents_bchw)
    return signal * noise - sigma * latents_bchw


def denoised(
    noisy: Tensor,
    output: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: PredictionType,
) -> tuple[Tensor, Tensor]:
    """The x_0 and ε that a network's output stands for; the inverse of `target`."""
    signal, sigma = _signal_and_noise(timesteps, alphas_cumprod, noisy)
    if prediction_type == "epsilon":
        return (noisy - sigma * output) / signal, output
    return signal * noisy - sigma * output, sigma * noisy + signal * output


def _signal_and_noise(
    timesteps: Tensor, alphas_cumprod: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    alpha = alphas_cumprod.to(like.device)[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt(), (1 - alpha).sqrt()
