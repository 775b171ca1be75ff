"""One training in several processes, each with a part of every batch.

Only gradients of what learns go from process to process, a few dozen megabytes for keys and
values. All random numbers of a step follow from the seed and the step's number, so every process
makes the same batch and takes its own samples out of it: what is learnt is what one process would
learn, up to rounding, and a checkpoint fits any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ...concept.errors import ConfigError
from .backward import Part


@dataclass(frozen=True)
class Replica:
    """One of the processes that take the same steps, each with its part of the batch: those of
    torch.distributed's default group. By itself it is all there is.

    The group carries CPU tensors, and those of the device that is trained on.
    """

    rank: int = 0
    size: int = 1

    def check(self, batch_size: int) -> None:
        """Raises ConfigError when a process would be without work."""
        if batch_size < self.size:
            raise ConfigError(
                f"batch_size={batch_size} gives {self.size} processes no picture each. Use "
                f"{self.size} or more, or fewer processes."
            )

    def part(self, samples: Part) -> Part:
        """This process's samples."""
        return samples if self.size == 1 else samples[self.rank :: self.size]

    def add_up(self, loss: float, parameters: Sequence[Tensor]) -> float:
        """Sums the gradients of all processes, and their losses. Every process must come here."""
        if self.size == 1:
            return loss
        # One that got no gradient in any process gets none here either, as in a single process.
        told = torch.tensor([loss, *(float(p.grad is not None) for p in parameters)])
        dist.all_reduce(told)
        for parameter, gradients in zip(parameters, told[1:].tolist(), strict=True):
            if gradients:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
        return float(told[0])

    def any(self, wish: bool) -> bool:
        """Whether one of the processes wishes it. Every process must come here."""
        if self.size == 1:
            return wish
        wishes = torch.tensor([float(wish)])
        dist.all_reduce(wishes)
        return bool(wishes)
