"""Under `torchrun` a training runs in several processes, on several GPUs or machines.

The first process leads: it decides where the training begins and when it stops, writes the files
and shows the progress. The others make the same steps with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ..concept.concept import Concept
from ..trainer.economy.processes import Replica
from .models import check_device

_CPU = torch.device("cpu")


class Team:
    """The processes that torchrun started; without it, one that leads nobody."""

    def __init__(self, replica: Replica, device: str) -> None:
        self.device = device
        """Of this process"""
        self._replica = replica
        self._led = False

    @property
    def leads(self) -> bool:
        return self._replica.rank == 0

    def train(
        self, run: Callable[..., Concept], *, should_stop: Callable[[], bool], **given: Any
    ) -> Concept:
        """The leader's `run`, in which the others take part.

        `run` is `trainer.loop.train`, but for the arguments that say where it begins and stops.
        """
        self._led = True
        shared = {name: value for name, value in given.items() if name != "on_event"}
        self._from_leader(shared)
        return self._run(run, should_stop, given)

    def follow(self, run: Callable[..., Concept]) -> None:
        """The others' part: waits for the leader, and does as it does."""
        given = self._from_leader(None)
        if given is not None:
            self._run(run, lambda: False, given)

    def dismiss(self) -> None:
        """Lets the others go when there was nothing to train."""
        if self.leads and not self._led:
            self._from_leader(None)

    def _run(
        self, run: Callable[..., Concept], should_stop: Callable[[], bool], given: dict[str, Any]
    ) -> Concept:
        return run(
            replica=self._replica, should_stop=lambda: self._replica.any(should_stop()), **given
        )

    def _from_leader(self, given: dict[str, Any] | None) -> dict[str, Any] | None:
        if self._replica.size == 1:
            return given
        box = [given]
        dist.broadcast_object_list(box, src=0, device=_CPU)
        return box[0]


@contextmanager
def team(device: str) -> Iterator[Team]:
    """While the context lasts the processes can train together. `device` is cpu or cuda."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield Team(Replica(), device)
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        check_device(device)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        together = Team(Replica(dist.get_rank(), dist.get_world_size()), device)
        yield together
        together.dismiss()
    finally:
        dist.destroy_process_group()
