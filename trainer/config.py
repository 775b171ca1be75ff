"""Settings of a training run, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ..concept.errors import ConfigError
from ..diffusion.latents import LATENT_PIXELS

MethodName = Literal[
    "custom diffusion",
    "low-rank",
    "cross-attention",
    "textual inversion",
    "dreambooth",
    "fine-tune all",
]
"""What learns: `trainer/methods/` has a file for each."""
OptimizerName = Literal["adamw", "adamw 8-bit"]
GradientCut = Literal["none", "start", "start and padding", "own words"]
Fit = Literal["crop", "letterbox"]


@dataclass(frozen=True)
class TrainConfig:
    """Custom Diffusion's recipe: 250 steps of 8 images at a learning rate of 8e-5.

    `trainer.methods.recipe` has those of other methods.
    """

    method: MethodName = "custom diffusion"
    rank: int = 16
    """Of the low-rank method's factors."""
    steps: int = 250
    """Optimiser steps."""
    batch_size: int = 8
    """Images a step; half of them are regularization images when there is a regularization set."""
    learning_rate: float = 8e-5
    """Effective rate, for keys, values and modifier token alike (the reference's 1e-5 times 8
    images).
    """
    micro_batch_size: int = 0
    """Images computed at once, a part of the batch; 0 is all of it. Less memory, the same step."""
    gradient_checkpointing: bool = False
    """Compute the UNet's blocks twice instead of keeping what is inside them: less memory."""
    optimizer: OptimizerName = "adamw"
    """With state in float32, or in 8 bits a number, a quarter of the memory (bitsandbytes)."""
    text_encoder_on_cpu: bool = False
    """Leave the text encoders in main memory, and let the CPU compute them: less of the device's
    memory, slower steps.
    """
    weight_decay: float = 1e-2
    """Of AdamW."""
    max_gradient_norm: float | None = 1.0
    """Gradients are scaled down to this norm; None leaves them."""
    prior_weight: float = 1.0
    """Weight of the regularization images' loss."""
    gradient_cut: GradientCut = "own words"
    """Where in a prompt keys and values learn. "own words": they change at V* and its class noun
    alone, in the forward pass too, so nothing is learnt that a merge or a route could lose, and
    regularization has nothing left to do (docs/fidelity.md). The others cut gradients only: "start"
    at the start token as the reference does, "start and padding", or "none". Methods that teach
    more than keys and values take "start and padding" for "own words".
    """
    resolution: int = 512
    """Edge of the training pictures, in pixels."""
    fit: Fit = "crop"
    """Of pictures that are not square: their centre, or all of them between grey bars that do not
    count.
    """
    augment: bool = True
    """Random resize with matching prompt prefixes, as in the paper."""
    flip: bool = True
    """Mirror half of the views; turn it off for writing and faces."""
    views_per_image: int = 16
    """Augmented views of each instance image that are encoded before training."""
    preview_every_steps: int = 50
    """A sample picture is drawn this often; 0 draws none."""
    seed: int = 0
    """Of everything random: data order, views, noise, timesteps and previews."""

    def __post_init__(self) -> None:
        _one_of("method", self.method, get_args(MethodName))
        _at_least("rank", self.rank, 1)
        _at_least("steps", self.steps, 1)
        _at_least("batch_size", self.batch_size, 1)
        _at_least("micro_batch_size", self.micro_batch_size, 0)
        _at_least("views_per_image", self.views_per_image, 1)
        _at_least("preview_every_steps", self.preview_every_steps, 0)
        _at_least("resolution", self.resolution, LATENT_PIXELS * 8)
        if self.resolution % LATENT_PIXELS:
            raise ConfigError(
                f"resolution={self.resolution} is no multiple of {LATENT_PIXELS}. "
                f"Use {round(self.resolution / LATENT_PIXELS) * LATENT_PIXELS}."
            )
        if not 0 < self.learning_rate < 1:
            raise ConfigError(
                f"learning_rate={self.learning_rate} is outside 0..1; the paper's is 8e-5."
            )
        if not (0 <= self.prior_weight < math.inf and 0 <= self.weight_decay < math.inf):
            raise ConfigError(
                f"prior_weight={self.prior_weight} and weight_decay={self.weight_decay} "
                f"must be numbers of 0 or more."
            )
        if self.max_gradient_norm is not None and not self.max_gradient_norm > 0:
            raise ConfigError(
                f"max_gradient_norm={self.max_gradient_norm} would stop all learning. "
                f"Use a number above 0, or None for no limit."
            )
        _one_of("optimizer", self.optimizer, get_args(OptimizerName))
        _one_of("gradient_cut", self.gradient_cut, get_args(GradientCut))
        _one_of("fit", self.fit, get_args(Fit))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(
            f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, known))}."
        )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name}={value} is too small; it must be at least {least}.")
