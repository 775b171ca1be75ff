"""Gradients of a step in as much memory as there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ...diffusion.protocols import Denoiser
from .frozen_layers import replaced_forward


class Sliceable(Protocol):
    """Samples side by side, of which a slice is the part."""

    def __len__(self) -> int: ...

    def __getitem__(self: Part, part: slice, /) -> Part: ...


Part = TypeVar("Part", bound=Sliceable)


class Backward:
    """Computes a step's gradients, a part of the batch at a time.

    When memory runs out the step is computed again with half as many samples at a time; when one
    sample is too much, with activation checkpointing as well (Chen et al. 2016): the network's
    blocks keep their inputs only, and are computed twice. Gradients are the same up to rounding.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        micro_batch_size: int,
        recomputing: bool,
        on_less: Callable[[int, bool], None],
    ) -> None:
        """`on_less` is told the new micro-batch size and whether blocks are recomputed."""
        self._denoiser = denoiser
        self._micro_batch_size = micro_batch_size
        self._recomputing = recomputing
        self._on_less = on_less

    def __call__(
        self,
        loss_of: Callable[[Part], Tensor],
        samples: Part,
        leaves: Sequence[Tensor],
    ) -> float:
        """Leaves the gradients of the loss in `leaves`, and returns it.

        `loss_of` gives what some of the samples add to the loss. Raises torch.OutOfMemoryError when
        one at a time is too much.
        """
        while True:
            for leaf in leaves:
                leaf.grad = None
            try:
                return self._attempt(loss_of, samples)
            except torch.OutOfMemoryError:
                at_once = self._at_once(len(samples))
                if at_once == 1 and self._recomputing:
                    raise
                self._recomputing |= at_once == 1
                self._micro_batch_size = math.ceil(at_once / 2)
            # Here, where the error no longer holds on to the tensors of the attempt.
            if self._denoiser.device.type == "cuda":
                torch.cuda.empty_cache()
            self._on_less(self._micro_batch_size, self._recomputing)

    def _attempt(self, loss_of: Callable[[Part], Tensor], samples: Part) -> float:
        total, count = 0.0, len(samples)
        at_once = self._at_once(count)
        blocks = self._denoiser.blocks if self._recomputing else ()
        with recomputed(self._denoiser.network, blocks):
            for start in range(0, count, at_once):
                loss = loss_of(samples[start : start + at_once])
                loss.backward()
                total += float(loss.detach())
        return total

    def _at_once(self, count: int) -> int:
        return min(self._micro_batch_size or count, count)


@contextmanager
def recomputed(network: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """While the context lasts, these modules of the network keep their inputs only."""
    with ExitStack() as stack:
        for path in blocks:
            module = network.get_submodule(path)
            forward = partial(
                recompute, module.forward, use_reentrant=False, preserve_rng_state=False
            )
            stack.enter_context(replaced_forward(module, forward))
        yield
