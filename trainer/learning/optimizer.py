"""The optimiser of a run: AdamW, its state in float32 or in 8 bits a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...concept.errors import ConfigError
from ..config import TrainConfig


def make_optimizer(config: TrainConfig, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """AdamW over the parameters (Loshchilov and Hutter 2019).

    With 8 bits the state is a quarter as large (Dettmers et al. 2022, of the bitsandbytes
    package); parameters of fewer than 4096 numbers, modifier tokens among them, keep float32.
    Raises ConfigError where that package is not installed.
    """
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw 8-bit":
        return _bitsandbytes().optim.AdamW8bit(parameters, **settings)  # type: ignore[no-any-return]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.AdamW(parameters, **settings, fused=fused)  # type: ignore[arg-type]


def check_optimizer(config: TrainConfig) -> None:
    """Raises ConfigError where the optimiser cannot be made, before anything else is done."""
    if config.optimizer == "adamw 8-bit":
        _bitsandbytes()


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f"The optimizer 'adamw 8-bit' is that of the package bitsandbytes, which cannot be "
            f"imported ({error}). Run `pip install bitsandbytes` in the Python of this program, "
            f"or choose 'adamw'."
        ) from error
    return bitsandbytes
