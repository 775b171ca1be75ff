"""The denoising loss, with valid regions and prior preservation (Custom Diffusion, §3.1)."""

import torch
from torch import Tensor


def sample_losses(prediction: Tensor, target: Tensor, masks_bhw: Tensor) -> Tensor:
    """Mean squared error of each sample (b,) over its valid region and all channels."""
    error = (prediction.float() - target.float()).square().mean(1)
    return (error * masks_bhw).sum((1, 2)) / masks_bhw.sum((1, 2)).clamp_min(1)


def sample_weights(count: int, prior: int, prior_weight: float) -> Tensor:
    """What each sample's loss counts (count,): their weighted sum is the mean of the instances plus
    `prior_weight` times the mean of the last `prior` samples.
    """
    weights = torch.full((count,), 1 / (count - prior))
    weights[count - prior :] = prior_weight / max(prior, 1)
    return weights
