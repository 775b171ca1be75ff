"""The optimiser of a run: AdamW, its state in float32 or in 8 bits a number, AdamW that averages
instead of following a schedule, and Prodigy, which finds its rate itself.

What is not PyTorch's own comes from its authors' packages, which are needed for that choice alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...concept.errors import ConfigError
from ..config import OptimizerName, TrainConfig

_PACKAGES: Mapping[OptimizerName, str] = {
    "adamw 8-bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "adamw schedule-free": "schedulefree",
}
"""Choice → what has to be installed for it"""


def make_optimizer(
    config: TrainConfig, parameters: Sequence[Tensor], words: Sequence[Tensor] = ()
) -> torch.optim.Optimizer:
    """What changes the parameters, in their order; `words` are those with a rate of their own.

    - `adamw`: Loshchilov and Hutter 2019.
    - `adamw 8-bit`: the same with a state a quarter as large (Dettmers et al. 2022); parameters of
      fewer than 4096 numbers, modifier tokens among them, keep float32.
    - `prodigy`: Mishchenko and Defazio 2023, with its authors' settings for diffusion models.
    - `adamw schedule-free`: Defazio et al. 2024. What it has learnt is an average: `averaged`.

    Raises ConfigError where a package is not installed.
    """
    groups = _groups(config, parameters, words)
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
        return torch.optim.AdamW(groups, **settings, fused=fused)  # type: ignore[arg-type]
    package = _package(config.optimizer)
    if config.optimizer == "adamw 8-bit":
        return package.optim.AdamW8bit(groups, **settings)  # type: ignore[no-any-return]
    if config.optimizer == "prodigy":
        # Weight decay comes after: the package prints a line for one that it is given.
        optimizer = package.Prodigy(groups, lr=1.0, use_bias_correction=True, safeguard_warmup=True)
        for group in optimizer.param_groups:
            group["weight_decay"] = config.weight_decay
        return optimizer  # type: ignore[no-any-return]
    optimizer = package.AdamWScheduleFree(groups, **settings, warmup_steps=config.warmup_steps)
    optimizer.train()
    return optimizer  # type: ignore[no-any-return]


def check_optimizer(config: TrainConfig) -> None:
    """Raises ConfigError where the optimiser cannot be made, before anything else is done."""
    if config.optimizer in _PACKAGES:
        _package(config.optimizer)
    if config.optimizer == "prodigy" and config.word_learning_rate:
        raise ConfigError(
            f"word_learning_rate={config.word_learning_rate:g} does not go with the optimizer "
            f"'prodigy', which finds one rate for all that learns. Set it to 0, or choose 'adamw'."
        )


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While the context lasts the parameters are what was learnt so far; afterwards, to the bit,
    where they were. Of most optimisers they are that anyway.
    """
    average = getattr(optimizer, "eval", None)
    if average is None:
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    average()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
        for group in optimizer.param_groups:
            group["train_mode"] = True


def _groups(
    config: TrainConfig, parameters: Sequence[Tensor], words: Sequence[Tensor]
) -> list[Any]:
    """The parameters, or groups of those with the same rate, in their order."""
    if not config.word_learning_rate or not words:
        return list(parameters)
    own = {id(word) for word in words}
    groups: list[dict[str, Any]] = []
    for parameter in parameters:
        rate = config.word_learning_rate if id(parameter) in own else config.learning_rate
        if not groups or groups[-1]["lr"] != rate:
            groups.append({"params": [], "lr": rate})
        groups[-1]["params"].append(parameter)
    return groups


def _package(name: OptimizerName) -> Any:
    try:
        return _imported(name)
    except ImportError as error:
        package = _PACKAGES[name]
        raise ConfigError(
            f"The optimizer {name!r} is that of the package {package}, which cannot be imported "
            f"({error}). Run `pip install {package}` in the Python of this program, or choose "
            f"'adamw'."
        ) from error


def _imported(name: OptimizerName) -> Any:
    if name == "prodigy":
        import prodigyopt

        return prodigyopt
    if name == "adamw schedule-free":
        import schedulefree

        return schedulefree
    import bitsandbytes

    return bitsandbytes
