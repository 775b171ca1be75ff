"""Values of every cross-attention layer, trained while its keys stay the network's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...concept.delta import Delta, DenseDelta
from ...diffusion.protocols import Denoiser
from .projections import KeyValueProjections, StackedLinear


class ValueProjections(KeyValueProjections):
    """Every entry of every value projection learns; where words look stays as it was.

    Keys that were learnt before stay as they are, and are part of what `deltas` returns.
    """

    def __init__(self, denoiser: Denoiser, earlier: Mapping[str, Delta]) -> None:
        super().__init__(denoiser, earlier)
        parts = self._with_earlier().split(self._sizes)
        self._is_value = [layer.endswith("to_v") for layer in self._layers]
        pairs = list(zip(parts, self._is_value, strict=True))
        keys = torch.cat([part for part, is_value in pairs if not is_value])
        self._keys = keys.to(denoiser.dtype)
        self.weight = nn.Parameter(torch.cat([part for part, is_value in pairs if is_value]))

    def parameters(self) -> list[nn.Parameter]:
        return [self.weight]

    def deltas(self) -> dict[str, Delta]:
        values = iter(self.weight.detach().split(self._sizes_of(True)))
        found: dict[str, Delta] = {}
        for layer, own, is_value in zip(self._layers, self._weights, self._is_value, strict=True):
            if is_value:
                part = next(values)
                found[layer] = DenseDelta((part - own.to(part)).cpu())
            elif layer in self._earlier:
                found[layer] = self._earlier[layer]
        return found

    def _keys_values(self, context: Tensor) -> Tensor:
        learnt: Tensor = StackedLinear.apply(context, self.weight)  # type: ignore[no-untyped-call]
        values = iter(learnt.split(self._sizes_of(True), -1))
        keys = iter(F.linear(context, self._keys).split(self._sizes_of(False), -1))
        return torch.cat([next(values if is_value else keys) for is_value in self._is_value], -1)

    def _sizes_of(self, values: bool) -> list[int]:
        """Rows of each of the value projections, or of the key projections."""
        pairs = zip(self._sizes, self._is_value, strict=True)
        return [size for size, is_value in pairs if is_value == values]
