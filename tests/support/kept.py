"""What autograd keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def kept_bytes(weights: Iterable[Tensor] = ()) -> Iterator[list[int]]:
    """Counts what autograd keeps while the context lasts, each storage once, and no weight."""
    storages: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # so that no address is used twice
        return tensor

    total = [0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    for weight in weights:
        storages.pop(weight.data_ptr(), None)
    total[0] = sum(storages.values())
