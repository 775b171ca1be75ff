"""Changes that only mean something beside the base model's matrix: whole matrices, and adapters
that turn or scale what is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..concept.delta import Delta


class Relative(Protocol):
    """What a file says of one matrix, (out, in), of its base model."""

    kind: ClassVar[str]
    """What it is, for people, in the plural"""
    tells_base: ClassVar[bool]
    """Whether another base model shows, because the file states the matrix itself"""

    @property
    def shape(self) -> tuple[int | None, int | None]:
        """(out, in) of the matrix; None for what only the base model says."""
        ...

    def change(self, weight: Tensor) -> Tensor:
        """What is added to the base's `weight` (out, in), in float32. Raises ValueError."""
        ...


@dataclass(frozen=True)
class Whole:
    """The matrix after training."""

    weight: Tensor
    kind: ClassVar[str] = "whole weights"
    tells_base: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int | None, int | None]:
        return self.weight.shape[0], self.weight.shape[1]

    def change(self, weight: Tensor) -> Tensor:
        return self.weight.float() - weight


@dataclass(frozen=True)
class Decomposed:
    """DoRA (Liu et al. 2024): base and change together, each row or column scaled to its magnitude.
    The norm it has before is that of the sum, as where PEFT and LyCORIS train it.
    """

    delta: Delta
    magnitude: Tensor
    """The norms of the rows (out) or (out, 1), or of the columns (1, in), of base and change"""
    kind: ClassVar[str] = "a DoRA's directions and magnitudes"
    tells_base: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int | None, int | None]:
        return self.delta.shape

    def change(self, weight: Tensor) -> Tensor:
        out, width = weight.shape
        if self.magnitude.shape in ((out,), (out, 1)):
            axis = 1
        elif self.magnitude.shape == (1, width):
            axis = 0
        else:
            raise ValueError(
                f"magnitudes {tuple(self.magnitude.shape)} are neither those of its {out} rows nor "
                f"of its {width} columns"
            )
        moved = weight + self.delta.dense().float()
        norms: Tensor = moved.norm(dim=axis, keepdim=True)
        scaled: Tensor = self.magnitude.float().reshape(norms.shape) * moved / norms
        return scaled - weight


@dataclass(frozen=True)
class Scaled:
    """IA3 (Liu et al. 2022): each row or column grows by a share of itself."""

    shares: Tensor
    """(out) of the rows, or (in) of the columns"""
    of_columns: bool
    kind: ClassVar[str] = "an IA3's scales"
    tells_base: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int | None, int | None]:
        return (None, len(self.shares)) if self.of_columns else (len(self.shares), None)

    def change(self, weight: Tensor) -> Tensor:
        shares = self.shares.float()
        return weight * (shares if self.of_columns else shares[:, None])


@dataclass(frozen=True)
class Turned:
    """OFT (Qiu et al. 2023): blocks of rows, turned by Cayley's transform, and scaled again."""

    blocks: Tensor
    """(blocks, n, n), of which the skew-symmetric part counts"""
    bound: float
    """Of the norm of that part; 0 for none"""
    rescale: Tensor | None
    """(out) or (out, 1)"""
    kind: ClassVar[str] = "an OFT's rotations"
    tells_base: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int | None, int | None]:
        return self.blocks.shape[0] * self.blocks.shape[1], None

    def change(self, weight: Tensor) -> Tensor:
        skew = self.blocks.float() - self.blocks.float().transpose(1, 2)
        norm = float(skew.norm()) + 1e-8
        if 0 < self.bound < norm:
            skew = skew * (self.bound / norm)
        one = torch.eye(skew.shape[1])
        turn = torch.linalg.solve(one - skew, one + skew)  # the two commute
        parts = weight.unflatten(0, skew.shape[:2])
        turned = torch.einsum("knm,kni->kmi", turn, parts).flatten(0, 1)
        if self.rescale is not None:
            turned = turned * self.rescale.float().reshape(len(turned), 1)
        return turned - weight


@dataclass(frozen=True)
class Generalized:
    """GLoRA (Chavan et al. 2023): a low-rank change of the matrix's inputs, and one of its own."""

    inputs: tuple[Tensor, Tensor]
    """(in, rank) and (rank, in), scaled"""
    own: tuple[Tensor, Tensor]
    """(out, rank) and (rank, in), scaled"""
    kind: ClassVar[str] = "a GLoRA's factors"
    tells_base: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int | None, int | None]:
        return self.own[0].shape[0], self.own[1].shape[1]

    def change(self, weight: Tensor) -> Tensor:
        up, down = self.inputs
        return weight @ up @ down + self.own[0] @ self.own[1]
