"""The key and value projections of every cross-attention layer, trained in place of the network's
own: densely, as low-rank factors, or not at all.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...concept.concept import hash_projections
from ...concept.delta import Delta, DenseDelta, LowRankDelta
from ...concept.errors import ConfigError
from ...concept.layers import sort_layers
from ...diffusion.protocols import Denoiser

_BLOCK = 2**24  # numbers; all of SD 1.5 are 19 million


def base_hash(denoiser: Denoiser) -> str:
    """Fingerprint of the model, by its key and value projections."""
    weight = denoiser.network.get_parameter
    return hash_projections(
        {layer: weight(f"{path}.weight") for layer, path in denoiser.projections.items()}
    )


class KeyValueProjections(ABC):
    """All key and value projections at once.

    Every projection reads the same text features, so all of them are one product:

        context (b, n, d) × weightᵀ (d, Σ out)  →  keys and values of every layer, side by side

    That is one place where gradients can be cut.

    `earlier` is what was learnt before, by layer; it is part of what `deltas` returns.
    """

    def __init__(self, denoiser: Denoiser, earlier: Mapping[str, Delta]) -> None:
        self._denoiser, self._earlier = denoiser, earlier
        self._layers = sort_layers(denoiser.projections)
        paths = [denoiser.projections[layer] for layer in self._layers]
        self._weights = [
            denoiser.network.get_parameter(f"{path}.weight").detach() for path in paths
        ]
        self._sizes = [len(weight) for weight in self._weights]
        self._slots = {path: _Slot() for path in paths}

    @cached_property
    def base_hash(self) -> str:
        """Of the network's own projections; while they are not installed."""
        return base_hash(self._denoiser)

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser changes; float32, on the denoiser's device."""

    @abstractmethod
    def deltas(self) -> Mapping[str, Delta]:
        """What was learnt so far and before, by layer, on the CPU in float32."""

    @abstractmethod
    def _keys_values(self, context: Tensor) -> Tensor:
        """Context (b, n, d) → keys and values (b, n, Σ out), layers in order."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While the context lasts the network uses these projections; afterwards its own again."""
        network = self._denoiser.network
        own = {path: network.get_submodule(path) for path in self._slots}
        try:
            for path, slot in self._slots.items():
                _set_submodule(network, path, slot)
            yield
        finally:
            for path, module in own.items():
                _set_submodule(network, path, module)
            for slot in self._slots.values():
                slot.value = None

    def predict(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        context: Tensor,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
        *,
        passing: Tensor | None = None,
        own: Tensor | None = None,
    ) -> Tensor:
        """The network's prediction with these projections, while they are installed.

        `passing` (b, n) is one where gradients of keys and values pass, zero where they are cut.
        `own` (b, n) is one where keys and values change at all: K_j = W₀ c_j + m_j ΔW c_j (spliced
        training, after LatexBlend, Jin et al., CVPR 2025). Without it they change everywhere.
        """
        context = context.to(self._denoiser.device, self._denoiser.dtype)
        if own is None:
            keys_values = self._keys_values(context)
        else:
            rows = own.nonzero(as_tuple=True)
            unchanged = torch.cat([F.linear(context, w.to(context)) for w in self._weights], -1)
            keys_values = unchanged.index_put(rows, self._keys_values(context[rows]))
        if passing is not None and keys_values.requires_grad:
            passing = passing[:, :, None].to(keys_values)
            keys_values.register_hook(lambda gradient: gradient * passing)
        for slot, part in zip(
            self._slots.values(), keys_values.split(self._sizes, -1), strict=True
        ):
            slot.value = part  # stays: activation checkpointing asks for it once more
        return self._denoiser.predict(noisy_latents, timesteps, context, pooled, sizes)

    @torch.no_grad()
    def predict_unchanged(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        context: Tensor,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """The network's prediction with its own keys and values, nothing learnt."""
        nowhere = torch.zeros(context.shape[:2])
        return self.predict(noisy_latents, timesteps, context, pooled, sizes, own=nowhere)

    def computed(self, path: str) -> Tensor:
        """The keys or values (b, n, out) of the newest prediction, by the module's path."""
        value = self._slots[path].value
        assert value is not None, "they are computed by predict"
        return value

    def _stacked(self, dtype: torch.dtype) -> Tensor:
        """The network's own weights (Σ out, d)."""
        return torch.cat([weight.to(self._denoiser.device, dtype) for weight in self._weights])

    def _with_earlier(self) -> Tensor:
        """The same with what was learnt before, float32."""
        parts = self._stacked(torch.float32).split(self._sizes)
        changes = [self._earlier.get(layer) for layer in self._layers]
        return torch.cat(
            [w + c.dense().to(w) if c else w for w, c in zip(parts, changes, strict=True)]
        )


class DenseProjections(KeyValueProjections):
    """Every entry of every projection learns, as in Custom Diffusion: one matrix, one parameter."""

    def __init__(self, denoiser: Denoiser, earlier: Mapping[str, Delta]) -> None:
        super().__init__(denoiser, earlier)
        self.weight = nn.Parameter(self._with_earlier())

    def parameters(self) -> list[nn.Parameter]:
        return [self.weight]

    def deltas(self) -> dict[str, Delta]:
        parts = self.weight.detach().split(self._sizes)
        return {
            layer: DenseDelta((part - own.to(part)).cpu())
            for layer, part, own in zip(self._layers, parts, self._weights, strict=True)
        }

    def _keys_values(self, context: Tensor) -> Tensor:
        return StackedLinear.apply(context, self.weight)  # type: ignore[no-any-return,no-untyped-call]


class LowRankProjections(KeyValueProjections):
    """The change of every projection is `up` (out, rank) times `down` (rank, d) (Hu et al. 2022).

    Gradients and optimiser state are as small as the factors. What was learnt before may be of no
    higher rank: its factors learn on. Raises ConfigError for a rank that a layer does not have.
    """

    def __init__(
        self, denoiser: Denoiser, earlier: Mapping[str, Delta], rank: int, seed: int
    ) -> None:
        super().__init__(denoiser, earlier)
        self._rank = rank
        generator = torch.Generator().manual_seed(seed)
        self._base = self._stacked(denoiser.dtype)
        width = self._base.shape[1]
        full = min(width, *self._sizes)
        if rank > full:
            raise ConfigError(
                f"rank={rank} is more than keys and values of this model have, {full} at least. "
                f"Set a rank of {full} or less, or choose the method 'custom diffusion'."
            )
        # As LoRA starts: any `down`, and an `up` of zeros, so that nothing is changed at first.
        down = torch.rand(rank * len(self._sizes), width, generator=generator) * 2 - 1
        down, up = down / math.sqrt(width), torch.zeros(len(self._base), rank)
        for layer, d, u in zip(self._layers, down.split(rank), up.split(self._sizes), strict=True):
            if layer in earlier:
                before = low_rank_factors(earlier[layer], layer, rank)
                d[: before.rank] = before.down
                u[:, : before.rank] = before.up
        self.down = nn.Parameter(down.to(denoiser.device))
        self.up = nn.Parameter(up.to(denoiser.device))

    def parameters(self) -> list[nn.Parameter]:
        return [self.down, self.up]

    def deltas(self) -> dict[str, Delta]:
        downs = self.down.detach().cpu().split(self._rank)
        ups = self.up.detach().cpu().split(self._sizes)
        return {
            layer: LowRankDelta(up.clone(), down.clone())
            for layer, up, down in zip(self._layers, ups, downs, strict=True)
        }

    def _keys_values(self, context: Tensor) -> Tensor:
        inner = F.linear(context, self.down.to(context.dtype)).split(self._rank, -1)
        ups = self.up.to(context.dtype).split(self._sizes)
        change = [F.linear(part, up) for part, up in zip(inner, ups, strict=True)]
        return F.linear(context, self._base) + torch.cat(change, -1)


class FrozenProjections(KeyValueProjections):
    """Those of the network with what was learnt before, as they are."""

    def __init__(self, denoiser: Denoiser, earlier: Mapping[str, Delta]) -> None:
        super().__init__(denoiser, earlier)
        self._base = self._with_earlier().to(denoiser.dtype)

    def parameters(self) -> list[nn.Parameter]:
        return []

    def deltas(self) -> dict[str, Delta]:
        return {layer: self._earlier[layer] for layer in self._layers if layer in self._earlier}

    def _keys_values(self, context: Tensor) -> Tensor:
        return F.linear(context, self._base)


class StackedLinear(torch.autograd.Function):
    """A product with a float32 matrix that learns, in the type of the other side.

    The matrix of SDXL takes 1.3 GiB, and so does its gradient. Nothing else of its size is made:
    casts last for a block of rows, and a further part of a step adds its gradient in place, which
    autograd would only do after the whole of it.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: nn.Parameter) -> Tensor:
        ctx.save_for_backward(values)
        ctx.weight = weight  # itself, for its gradient
        blocks = weight.split(_block_rows(weight))
        return torch.cat([F.linear(values, rows.to(values.dtype)) for rows in blocks], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (values,) = ctx.saved_tensors
        weight, count = ctx.weight, _block_rows(ctx.weight)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        of_values = torch.zeros_like(values, dtype=torch.float32)
        blocks = weight.split(count), weight.grad.split(count), gradient.split(count, -1)
        for rows, of_rows, part in zip(*blocks, strict=True):
            of_rows += part.flatten(0, -2).T @ values.flatten(0, -2)
            if ctx.needs_input_grad[0]:
                of_values += part @ rows.to(part.dtype)
        return of_values.to(values.dtype), None


def _block_rows(weight: Tensor) -> int:
    return max(1, _BLOCK // weight.shape[1])


class _Slot(nn.Module):
    """Stands where a projection was and hands out its keys or values, computed beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def forward(self, context: Tensor) -> Tensor:
        assert self.value is not None, "the projections are computed by KeyValueProjections.predict"
        return self.value


def low_rank_factors(delta: Delta, layer: str, rank: int) -> LowRankDelta:
    """The factors that learn on. Raises ConfigError where there are none of so low a rank."""
    factors = delta.factors
    if factors is None or factors.rank > rank:
        given = "no low rank" if factors is None else f"rank {factors.rank}"
        raise ConfigError(
            f"The concept to extend is of {given} in {layer}; the low-rank method would continue "
            f"at rank {rank}. Set a rank as high, or choose the method 'custom diffusion'."
        )
    return factors


def _set_submodule(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)
