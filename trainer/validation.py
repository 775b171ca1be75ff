"""The loss on pictures that a training keeps back: at noise and timesteps that stay the same, so
that two steps of a run differ by what was learnt between them alone.

The loss of a step hides that: most of it is how much noise the step happened to draw.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from ..concept.errors import TrainingError
from ..diffusion.protocols import Denoiser
from .checkpoint import Checkpoint
from .config import TrainConfig
from .data.batches import Batch
from .data.buckets import Frame
from .data.latents import EncodedView, LatentBank
from .economy.processes import Replica
from .events import NoLongerBetter
from .learner import Learner
from .learning.samples import Samples, loss_of, samples_of

_SAMPLES_PER_PICTURE = 16
_MOST_SAMPLES = 64
"""Of few pictures; of more than so many each has one."""
_LOWER = 0.999
"""A loss is lower than another when it is less than so much of it: the rest is flat."""


class Validation:
    """What is measured of a run, and whether it should end. Without pictures nothing is."""

    def __init__(
        self,
        config: TrainConfig,
        banks: Sequence[LatentBank],
        denoiser: Denoiser,
        learner: Learner,
        replica: Replica,
    ) -> None:
        # Every amount of noise counts alike, so that losses of other settings can be compared.
        self._config = replace(config, loss_weighting="none")
        self._denoiser, self._learner = denoiser, learner
        self._replica = replica
        self._batches = validation_batches(banks, config)
        self.losses: dict[int, float] = {}
        """By step"""
        self.best: tuple[Tensor, ...] = ()
        """What had been learnt where it was lowest, where the run ends with that"""
        self.ended = False

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on from what was measured until a checkpoint, which then holds none of it."""
        self.best, checkpoint.best = checkpoint.best if self._stops else (), ()
        if self._stops and not self.best:  # a run that was not to stop: its best cannot be taken
            return
        self.losses = dict(checkpoint.validation)
        self.ended = self._stops and self._flat_steps() >= self._config.patience_steps

    def after(self, step: int) -> float | None:
        """The loss after a step; None where it is not measured then."""
        if not self._batches or step % self._config.validation_every_steps:
            return None
        count = sum(len(batch.prompts) for batch in self._batches)
        with self._learner.as_learnt():
            losses = [len(batch.prompts) / count * self._loss(batch) for batch in self._batches]
            return self._measured(step, sum(losses))

    def _measured(self, step: int, loss: float) -> float:
        """Keeps the loss after a step, and what was learnt until then where it is the lowest."""
        if not math.isfinite(loss):
            raise TrainingError(
                f"The validation loss became {loss} at step {step}; a finite number was needed. "
                f"Lower the learning rate, or train in float32."
            )
        self.losses[step] = loss
        if self._stops and best_step(self.losses) == step:
            self.best = tuple(p.detach().cpu().clone() for p in self._learner.parameters)
        return loss

    def advice(self, step: int) -> NoLongerBetter | None:
        """What is to be told after a measured step: once, when it has been flat for long enough."""
        flat, patience = self._flat_steps(), self._config.patience_steps
        before = flat - self._config.validation_every_steps
        if self._config.early_stopping == "off" or not before < patience <= flat:
            return None
        self.ended = self._stops
        best = best_step(self.losses)
        return NoLongerBetter(step, best, self.losses[best], self.ended)

    def take_best(self, losses: Sequence[float]) -> Sequence[float]:
        """Where the run ends with the best step: makes what is learnt what it was then. Returns the
        losses until the step that it is of.
        """
        if not self.best:
            return losses
        with torch.no_grad():
            for parameter, value in zip(self._learner.parameters, self.best, strict=True):
                parameter.copy_(value)
        return losses[: best_step(self.losses)]

    @property
    def _stops(self) -> bool:
        return self._config.early_stopping == "on"

    def _flat_steps(self) -> int:
        """How many steps ago it fell last; 0 where nothing was measured."""
        return max(self.losses) - fallen_until(self.losses) if self.losses else 0

    @torch.no_grad()
    def _loss(self, batch: Batch) -> float:
        """The mean over all samples, one at a time: with as little memory as a training has."""
        text = self._learner.prompts.encode(batch.prompts)
        noise, timesteps = fixed_noise(batch, self._config.seed, self._denoiser)
        samples = self._replica.part(
            samples_of(batch, noise, timesteps, text, self._denoiser, self._config)
        )
        return self._replica.add_up(_sum_of_losses(self._learner, samples), ())


def _sum_of_losses(learner: Learner, samples: Samples) -> float:
    each = (samples[place : place + 1] for place in range(len(samples)))
    return sum(float(loss_of(learner.projections, one)) for one in each)


def validation_batches(banks: Sequence[LatentBank], config: TrainConfig) -> list[Batch]:
    """Samples of all pictures that are kept back, in turn, each with its views in turn; those of a
    frame together.
    """
    pictures = list(chain.from_iterable(bank.kept_back for bank in banks))
    count = max(len(pictures), min(_SAMPLES_PER_PICTURE * len(pictures), _MOST_SAMPLES))
    framed: dict[Frame, list[EncodedView]] = {}
    for place in range(count):
        turn, picture = divmod(place, len(pictures))
        view = pictures[picture][turn % len(pictures[picture])]
        framed.setdefault(view.frame, []).append(view)
    return [_batch_of(views, config) for views in framed.values()]


def _batch_of(views: Sequence[EncodedView], config: TrainConfig) -> Batch:
    mean, deviation = (torch.stack([getattr(v, k) for v in views]) for k in ("mean", "deviation"))
    drawn = torch.randn(mean.shape, generator=_generator(f"{config.seed} validation latents"))
    return Batch(
        latents_bchw=mean + deviation * drawn,
        masks_bhw=torch.stack([view.mask for view in views]),
        prompts=tuple(view.prompt for view in views),
        sizes=torch.tensor([view.sizes for view in views]),
        prior=0,
    )


def fixed_noise(batch: Batch, seed: int, denoiser: Denoiser) -> tuple[Tensor, Tensor]:
    """Noise, and timesteps at equal distances: the middles of as many parts of the schedule as
    there are samples.
    """
    count, timesteps = len(batch.prompts), len(denoiser.alphas_cumprod)
    noise = torch.randn(batch.latents_bchw.shape, generator=_generator(f"{seed} validation noise"))
    return noise, torch.tensor(
        [(2 * place + 1) * timesteps // (2 * count) for place in range(count)]
    )


def best_step(losses: Mapping[int, float]) -> int:
    """Where the loss is lowest; of several such steps the first."""
    return min(losses, key=lambda step: (losses[step], step))


def fallen_until(losses: Mapping[int, float]) -> int:
    """The last step at which the loss was clearly lower than ever before."""
    last = min(losses)
    for step in sorted(losses):
        if losses[step] < _LOWER * losses[last]:
            last = step
    return last


def _generator(seed: str) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(seed).getrandbits(32))
