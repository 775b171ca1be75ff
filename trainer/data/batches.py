"""What each step is trained on, drawn from the latents of a run: whoever knows the seed and the
number of a step knows its batch.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..config import TrainConfig
from .buckets import Frame
from .latents import EncodedView, LatentBank
from .wording import varies, worded

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """What one step is trained on. The last `prior` samples are regularization images."""

    latents_bchw: Tensor
    masks_bhw: Tensor
    prompts: tuple[str, ...]
    sizes: Tensor
    """`Sizes` of each, (b, 6)"""
    prior: int
    subject_masks: tuple[Mapping[str, Tensor], ...] = ()
    """Of each, where known: what a concept is called → where its subject is seen (h, w)"""
    balance: Tensor | None = None
    """What each counts beside the others (b,), 1 in the mean of a run; None: all count alike"""


class Batches:
    """What the steps of a run are trained on: pictures of one frame a step. Concepts come up
    equally often, and so does every image of a concept; its views and latents are drawn at random.

    Of several frames each has as many steps as its pictures need for that.
    """

    def __init__(self, banks: Sequence[LatentBank], config: TrainConfig) -> None:
        self._config = config
        frames = {views[0].frame for bank in banks for views in bank.instances}
        self._parts = [_Part(banks, frame, config, len(frames)) for frame in sorted(frames)]
        means = [fmean(views[0].weight for views in bank.instances) for bank in banks]
        self._mean_weight = fmean(means)
        self._turns = Turns([part.share / part.taught for part in self._parts])

    @property
    def pictures(self) -> dict[Frame, int]:
        """How many of each frame a run is taught."""
        return {part.frame: part.count for part in self._parts}

    @property
    def fewer(self) -> list[Frame]:
        """Frames of which there are fewer pictures than a step takes."""
        return [part.frame for part in self._parts if part.count < part.taught]

    def of_step(self, step: int, rng: random.Random, generator: torch.Generator) -> Batch:
        """What step `step`, from 0 on, is trained on, with the randomness of that step."""
        which, nth = self._turns[step]
        part = self._parts[which]
        prior = self._config.batch_size - part.taught
        turns = range(nth * part.taught, (nth + 1) * part.taught)
        views = [self._drawn(*part.instances.at(turn), rng) for turn in turns]
        turns = range(nth * prior, (nth + 1) * prior)
        views += [part.regularization.at(turn) for turn in turns]
        mean, deviation = (
            torch.stack([getattr(v, k) for v in views]) for k in ("mean", "deviation")
        )
        return Batch(
            latents_bchw=mean + deviation * torch.randn(mean.shape, generator=generator),
            masks_bhw=torch.stack([view.mask for view in views]),
            prompts=tuple(self._prompt(view, rng) for view in views),
            sizes=torch.tensor([view.sizes for view in views]),
            prior=prior,
            subject_masks=tuple(view.subject_masks for view in views),
            balance=self._balance(views[: part.taught], prior),
        )

    def _prompt(self, view: EncodedView, rng: random.Random) -> str:
        if view.wording is None or not varies(self._config):
            return view.prompt
        return worded(view.wording, self._config, rng)

    def _balance(self, taught: Sequence[EncodedView], prior: int) -> Tensor | None:
        """Pictures come up equally often, so the mean over a run is that over all pictures."""
        weights = [view.weight / self._mean_weight for view in taught]
        return None if set(weights) == {1.0} else torch.tensor([*weights, *[1.0] * prior])

    def _drawn(
        self, views: Sequence[EncodedView], mixed: Sequence[EncodedView], rng: random.Random
    ) -> EncodedView:
        """Of an image, or with the probability of Seg-Mix of its subject beside another."""
        view = rng.choice(views)
        if mixed and rng.random() < self._config.seg_mix:
            return rng.choice(mixed)
        return view


def step_randomness(seed: int, step: int) -> tuple[random.Random, torch.Generator]:
    """Everything random of a step follows from the run's seed and the number of the step: so a run
    goes on from any step without its past.
    """
    rng = random.Random(f"{seed} step {step}")
    return rng, torch.Generator().manual_seed(rng.getrandbits(32))


class _Part:
    """The pictures of one frame: views of each, with those that mix its subject with another's."""

    def __init__(
        self, banks: Sequence[LatentBank], frame: Frame, config: TrainConfig, frames: int
    ) -> None:
        instances = []
        for bank in banks:
            mixed = [view for view in bank.mixed if view.frame == frame]
            own = [views for views in bank.instances if views[0].frame == frame]
            instances.append([(views, mixed) for views in own])
        regularization = [[v for v in bank.regularization if v.frame == frame] for bank in banks]
        shares = [
            len(views) / len(bank.instances) for views, bank in zip(instances, banks, strict=True)
        ]
        self.share = sum(shares)
        self.frame, self.count = frame, sum(map(len, instances))
        seed = f"{config.seed}" if frames == 1 else f"{config.seed} {frame}"
        self.instances = _Queue(instances, shares, f"{seed} images")
        self.regularization = _Queue(regularization, [1.0 for _ in banks], f"{seed} regularization")
        prior = config.batch_size // 2 if any(regularization) else 0
        self.taught = config.batch_size - prior


class _Queue(Generic[T]):
    """Lists that take turns as their shares say, each in another order every time around. Empty
    ones are left out.
    """

    def __init__(self, lists: Sequence[Sequence[T]], shares: Sequence[float], seed: str) -> None:
        self._lists = [items for items in lists if items]
        self._turns = Turns([share for share, items in zip(shares, lists, strict=True) if items])
        self._seed = seed

    def at(self, turn: int) -> T:
        which, nth = self._turns[turn]
        items = self._lists[which]
        time_around, place = divmod(nth, len(items))
        return items[_order(f"{self._seed} {which} {time_around}", len(items))[place]]


class Turns:
    """An endless order in which each comes up as often as its share says, at equal distances: equal
    shares take turns.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self._shares = shares
        self._next = [(0.5 / share, which, 0) for which, share in enumerate(shares)]
        heapq.heapify(self._next)
        self._known: list[tuple[int, int]] = []

    def __getitem__(self, turn: int) -> tuple[int, int]:
        """Who comes at a turn, and how often it has come before."""
        while len(self._known) <= turn:
            _, which, nth = self._next[0]
            heapq.heapreplace(self._next, ((nth + 1.5) / self._shares[which], which, nth + 1))
            self._known.append((which, nth))
        return self._known[turn]


@lru_cache(maxsize=64)
def _order(seed: str, count: int) -> list[int]:
    return random.Random(seed).sample(range(count), count)
