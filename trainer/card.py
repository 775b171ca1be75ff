"""Settings that make a training fit a graphics card. None of them changes what is learnt, but for
the method where nobody has chosen one.

What a training holds is known for the models of each family at their own size
(`benchmarks/training_memory.py` counts it; docs/performance.md has the table), and grows with the
pixels of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from ..concept.layers import Family
from .config import TrainConfig

_GIB = 2**30
_ASIDE_GIB = 1.0
"""For CUDA and for the scratch space of single operations"""
_LEARNS, _GRADIENT, _BASE = 4, 4, 2
"""Bytes of a number that learns, of its gradient, and of one that stays as it is"""
_STATE = {"adamw": 8, "adamw 8-bit": 2}
"""Bytes of the optimiser's state"""


@dataclass(frozen=True)
class _Held:
    """GiB that a training of a family holds, weights in 16 bits."""

    edge: int
    """Of the pictures, in pixels"""
    unet: float
    text: float
    caption: float
    """For each one that holds the word"""
    picture: float
    """For each that is computed at once"""
    recomputed: float
    """The same with gradient checkpointing"""
    outputs: int
    """Of all key and value projections together"""
    layers: int


_HELD = {
    "sd15": _Held(512, 1.60, 0.30, 0.005, 0.47, 0.14, 24_960, 32),
    "sd2": _Held(768, 1.61, 0.73, 0.01, 1.04, 0.30, 24_960, 32),
    "sdxl": _Held(1024, 4.78, 1.71, 0.01, 3.71, 0.63, 166_400, 140),
}


def fit_card(
    config: TrainConfig, family: Family, free: bool, unet_bytes: int | None = None
) -> tuple[TrainConfig, str]:
    """The settings changed so that a training fits a card of `config.card_gb`, as little as that
    takes, and a sentence on what was changed and what is counted.

    `free` says that the method may be another one, `unet_bytes` how large the UNet's weights are;
    without it they have 16 bits. Where nothing fits, the smallest is taken, and that is said.
    """
    if family.name not in _HELD or _learning(config, family) is None:
        return config, (
            f"What the method {config.method} holds of {family.title} is not counted, so nothing "
            f"was chosen for a card of {config.card_gb} GB."
        )
    unet = _HELD[family.name].unet if unet_bytes is None else unet_bytes / _GIB
    tried, changes = config, {}
    for changes in _smaller(config, free):
        tried = replace(config, **changes)
        at_once = _fits(tried, family, unet)
        if at_once >= 1:
            parts = math.ceil(config.batch_size / at_once)
            micro = math.ceil(config.batch_size / parts) if parts > 1 else 0
            tried = replace(tried, micro_batch_size=micro or config.micro_batch_size)
            held = counted_gib(tried, family, tried.micro_batch_size or config.batch_size, unet)
            return tried, f"For a card of {config.card_gb} GB: {_said(tried, changes, held)}."
    tried = replace(tried, micro_batch_size=1)
    held = counted_gib(tried, family, 1, unet)
    return tried, (
        f"A card of {config.card_gb} GB is too small for pictures of {config.resolution} px: the "
        f"least that is counted is {held:.1f} GB, with {_said(tried, changes, held)}. It is tried "
        f"all the same. Lower the resolution, or load the UNet with 8-bit weights."
    )


def counted_gib(
    config: TrainConfig, family: Family, at_once: int, unet_gib: float | None = None
) -> float:
    """GiB at the most of a training that computes so many pictures at once, with what is set aside
    for the card itself.
    """
    held = _HELD[family.name]
    learning = _learning(config, family)
    assert learning is not None, config.method
    learns, stays = learning
    gradients = _GRADIENT * learns if at_once < config.batch_size else 0
    trained = (_LEARNS + _STATE[config.optimizer]) * learns + _BASE * stays + gradients
    each = held.recomputed if config.gradient_checkpointing else held.picture
    text = 0.0 if config.text_encoder_on_cpu else held.text + config.batch_size * held.caption
    return (
        (held.unet if unet_gib is None else unet_gib)
        + text
        + trained / _GIB
        + at_once * each * (config.resolution / held.edge) ** 2
        + _ASIDE_GIB
    )


def _learning(config: TrainConfig, family: Family) -> tuple[int, int] | None:
    """How many numbers of keys and values learn, and how many are held beside them as they are;
    None where more of the UNet learns.
    """
    held = _HELD[family.name]
    whole = held.outputs * family.context_width
    factors = config.rank * (held.outputs + held.layers * family.context_width)
    known: Mapping[str, tuple[int, int]] = {
        "custom diffusion": (whole, 0),
        "values only": (whole // 2, whole // 2),
        "low-rank": (factors, whole),
        "textual inversion": (0, whole),
    }
    return known.get(config.method)


def _smaller(config: TrainConfig, free: bool) -> Iterator[dict[str, Any]]:
    """What to try, from what costs least time to what costs most."""
    recomputed = {"gradient_checkpointing": True}
    elsewhere = {**recomputed, "text_encoder_on_cpu": True}
    yield from ({}, recomputed, elsewhere)
    if find_spec("bitsandbytes"):
        yield {**elsewhere, "optimizer": "adamw 8-bit"}
    if free and config.method != "low-rank":
        for changes in ({}, recomputed, elsewhere):
            yield {"method": "low-rank", **changes}


def _fits(config: TrainConfig, family: Family, unet_gib: float) -> int:
    """How many pictures of the batch at once, 0 where not even one."""
    for at_once in range(config.batch_size, 0, -1):
        if counted_gib(config, family, at_once, unet_gib) <= config.card_gb:
            return at_once
    return 0


def _said(config: TrainConfig, changes: Mapping[str, Any], held_gib: float) -> str:
    words = {
        "method": f"method {config.method}",
        "gradient_checkpointing": "gradient checkpointing",
        "text_encoder_on_cpu": "text encoders in main memory",
        "optimizer": f"optimizer {config.optimizer}",
    }
    said = [words[name] for name in changes]
    if config.micro_batch_size:
        said.append(f"{config.micro_batch_size} of {config.batch_size} pictures at once")
    return f"{', '.join(said) or 'all as it is set'}; {held_gib:.1f} GB are counted"
