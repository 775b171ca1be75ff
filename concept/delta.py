"""The change of one matrix, in the forms that it is kept in.

A new kind is a class here that does what `Delta` says, and a line in `KINDS`. Nothing else asks
which kind a delta is: it asks what the delta says of itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Delta(Protocol):
    """What a layer adds to its rows, (out, in)."""

    is_weight_patch: ClassVar[bool]
    """Whether it is one matrix whatever the layer reads, so that it can be added to the weight"""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        ...

    @property
    def factors(self) -> LowRankDelta | None:
        """The same as a product of two thin matrices; None where it is kept as something else."""
        ...

    @property
    def rank(self) -> int | None:
        """Of the factors; None without."""
        ...

    @property
    def numbers(self) -> int:
        """How many are kept."""
        ...

    def dense(self) -> Tensor:
        """The matrix (out, in), of a weight patch."""
        ...

    def map_rows(self, rows: Tensor) -> Tensor:
        """rows (s, in) → (s, out): what the change adds to the projection of each row."""
        ...

    def squared_norm(self) -> float:
        """Frobenius, of the matrix."""
        ...

    def is_zero(self) -> bool:
        """Whether it changes nothing, as far as can be seen without a product."""
        ...

    def to(self, dtype: torch.dtype) -> Delta: ...

    def scaled(self, factor: float) -> Delta:
        """In float32."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Named as stock LoRA loaders read them."""
        ...


@dataclass(frozen=True)
class DenseDelta:
    """The change as it is, `weight` (out, in)."""

    weight: Tensor

    PARTS: ClassVar[frozenset[str]] = frozenset({"diff"})
    is_weight_patch: ClassVar[bool] = True
    factors: ClassVar[None] = None
    rank: ClassVar[None] = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def numbers(self) -> int:
        return self.weight.numel()

    def dense(self) -> Tensor:
        return self.weight

    def map_rows(self, rows: Tensor) -> Tensor:
        return rows @ self.weight.to(rows.dtype).T

    def squared_norm(self) -> float:
        return float(self.weight.float().square().sum())

    def is_zero(self) -> bool:
        return not self.weight.any()

    def to(self, dtype: torch.dtype) -> DenseDelta:
        return DenseDelta(self.weight.to(dtype))

    def scaled(self, factor: float) -> DenseDelta:
        return DenseDelta(self.weight.float() * factor)

    def tensors(self) -> dict[str, Tensor]:
        return {"diff": self.weight}

    @staticmethod
    def of(layer: str, parts: Mapping[str, Tensor]) -> DenseDelta:
        return DenseDelta(parts["diff"])


@dataclass(frozen=True)
class LowRankDelta:
    """The change as `up` (out, rank) times `down` (rank, in)."""

    up: Tensor
    down: Tensor

    PARTS: ClassVar[frozenset[str]] = frozenset({"lora_up.weight", "lora_down.weight", "alpha"})
    is_weight_patch: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def factors(self) -> LowRankDelta:
        return self

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def numbers(self) -> int:
        return self.up.numel() + self.down.numel()

    def dense(self) -> Tensor:
        return self.up.float() @ self.down.float()

    def map_rows(self, rows: Tensor) -> Tensor:
        """Without building the dense matrix."""
        return (rows @ self.down.to(rows.dtype).T) @ self.up.to(rows.dtype).T

    def squared_norm(self) -> float:
        up, down = self.up.double(), self.down.double()
        return float(((up.T @ up) * (down @ down.T)).sum())

    def is_zero(self) -> bool:
        return not (self.up.any() and self.down.any())

    def to(self, dtype: torch.dtype) -> LowRankDelta:
        return LowRankDelta(self.up.to(dtype), self.down.to(dtype))

    def scaled(self, factor: float) -> LowRankDelta:
        """A root of the factor on either side: in half precision all of it on one could be too
        large or too small for the type.
        """
        root = math.sqrt(abs(factor))
        return LowRankDelta(self.up.float() * math.copysign(root, factor), self.down.float() * root)

    def tensors(self) -> dict[str, Tensor]:
        """alpha = rank makes the scale of stock loaders exactly one."""
        return {
            "lora_up.weight": self.up,
            "lora_down.weight": self.down,
            "alpha": torch.tensor(float(self.rank)),
        }

    @staticmethod
    def of(layer: str, parts: Mapping[str, Tensor]) -> LowRankDelta:
        """Raises ValueError where the parts are no factors."""
        up, down = parts["lora_up.weight"], parts["lora_down.weight"]
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != len(down) or not len(down):
            raise ValueError(
                f"{layer}: up {tuple(up.shape)} and down {tuple(down.shape)} do not chain"
            )
        delta = LowRankDelta(up, down)
        scale = float(parts["alpha"]) / delta.rank
        if not math.isfinite(scale):
            raise ValueError(f"{layer}.alpha is not finite")
        return delta if scale == 1.0 else delta.scaled(scale)


KINDS = (DenseDelta, LowRankDelta)
PARTS = frozenset().union(*(kind.PARTS for kind in KINDS))
"""What the tensors of a layer are called in a file, below its name"""


def delta_of(layer: str, parts: Mapping[str, Tensor]) -> Delta:
    """What a file's tensors of one layer stand for. Raises ValueError where they are no delta."""
    kind = next((kind for kind in KINDS if parts.keys() == kind.PARTS), None)
    if kind is None:
        raise ValueError(f"{layer} has {sorted(parts)}, needed 'diff' or up, down and alpha")
    return kind.of(layer, parts)


def shape_of(parts: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Of the matrix that a file's tensors of one layer stand for, before it is made; that of their
    own where they are no matrices.
    """
    up, down = parts.get("lora_up.weight"), parts.get("lora_down.weight")
    if up is not None and down is not None and up.ndim == down.ndim == 2:
        return len(up), down.shape[1]
    return tuple(next(iter(parts.values())).shape)
