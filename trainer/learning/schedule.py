"""How the learning rate goes over a training: a warm-up, then constant or down along a cosine."""

from __future__ import annotations

import math

import torch

from ...concept.errors import ConfigError
from ..config import TrainConfig

_FULL = "full_rate"
"""In a group of the optimiser: its rate where the schedule says 1"""


def rate_factor(config: TrainConfig, step: int) -> float:
    """What step `step`, from 0 on, has of the full rate.

    The warm-up grows in equal parts to the full rate, which the step after it has; the cosine then
    falls from there to nothing at the end (SGDR, Loshchilov and Hutter 2017, without restarts).
    """
    warmup = config.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(config.steps - warmup, 1)))


def set_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> None:
    """The rates of a step. Nothing about it is remembered: a run that is resumed goes on."""
    if config.schedule == "constant" and not config.warmup_steps:
        return
    if config.optimizer == "adamw schedule-free":  # counts its own warm-up steps
        return
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault(_FULL, group["lr"]) * rate_factor(config, step)


def check_schedule(config: TrainConfig) -> None:
    """Raises ConfigError for a schedule that cannot be."""
    if config.warmup_steps >= config.steps:
        raise ConfigError(
            f"warmup_steps={config.warmup_steps} is as long as the training or longer: it has "
            f"{config.steps} steps, so the full rate would never be reached. Use fewer, about a "
            f"tenth of the steps, or 0."
        )
    if config.schedule != "constant" and config.optimizer == "adamw schedule-free":
        raise ConfigError(
            f"schedule={config.schedule!r} does not go with the optimizer 'adamw schedule-free', "
            f"which averages instead. Set schedule to 'constant', or choose 'adamw'."
        )
