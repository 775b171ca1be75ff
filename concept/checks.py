"""What a concept can hold at most, and that its tensors are what they should be. Sizes are judged
by shapes, before anything of them is made: small factors can stand for a large matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .concept import Concept
from .delta import Delta
from .layers import MOST_LAYERS, MOST_NUMBERS, WIDEST, is_projection

MOST_VECTORS = 1000
"""Of a word for each text encoder; a prompt has 75"""
MOST_WORDS = 256
_LARGEST = torch.finfo(torch.float32).max


def check_sizes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError where matrices (out, in) by layer are more than any model has."""
    if len(shapes) > MOST_LAYERS:
        raise ValueError(
            f"it changes {len(shapes)} matrices, more than any model has; {MOST_LAYERS} are the "
            "most"
        )
    for layer, shape in shapes.items():
        if len(shape) != 2:
            raise ValueError(f"{layer} has shape {shape}, a matrix is needed")
        if not 0 < min(shape) <= max(shape) <= WIDEST:
            out, width = shape
            raise ValueError(
                f"{layer} stands for {out} x {width} numbers, more than any layer has or none; "
                f"{WIDEST} are the most either way"
            )
    numbers = sum(out * width for out, width in shapes.values())
    if numbers > MOST_NUMBERS:
        raise ValueError(
            f"its matrices stand for {numbers} numbers, more than any model has; {MOST_NUMBERS} "
            "are the most"
        )


def check_matrix(name: str, tensor: Tensor, width: int | None = None) -> None:
    """Raises ValueError unless it is (n, width) of floats that float32 has, finite all."""
    fits = tensor.ndim == 2 and tensor.numel() > 0 and width in (None, tensor.shape[1])
    if not (fits and tensor.is_floating_point()):
        needed = f"(n, {width})" if width else "a matrix"
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, needed floats {needed}")
    if not torch.isfinite(tensor.float() if tensor.dtype == torch.float64 else tensor).all():
        raise ValueError(f"{name} holds values that are not finite")


def check_concept(concept: Concept) -> None:
    """Raises ValueError unless a concept that was put together of somebody's tensors is of its
    family: finite matrices of the right widths, no more than a model has.
    """
    check_sizes({layer: delta.shape for layer, delta in concept.deltas.items()})
    for layer, delta in concept.deltas.items():
        _check_delta(layer, delta)
    if len(concept.tokens) > MOST_WORDS:
        raise ValueError(f"it has {len(concept.tokens)} words; {MOST_WORDS} are the most")
    for token in concept.tokens:
        for encoder, width in concept.family.text_encoders.items():
            rows = token.embeddings[encoder]
            check_matrix(f"{token.name}, {encoder}", rows, width)
            if len(rows) > MOST_VECTORS:
                raise ValueError(
                    f"{token.name} has {len(rows)} vectors; {MOST_VECTORS} are the most"
                )
    width = concept.family.context_width
    if not concept.deltas and not concept.tokens:
        raise ValueError("it holds neither projections nor tokens")
    for layer, delta in concept.deltas.items():
        if is_projection(layer) and delta.shape[1] != width:
            raise ValueError(
                f"{layer} reads width {delta.shape[1]}, {concept.family.title} has {width}"
            )


def _check_delta(layer: str, delta: Delta) -> None:
    for name, tensor in delta.tensors().items():
        if name != "alpha":
            check_matrix(f"{layer}.{name}", tensor)
    if (factors := delta.factors) is not None:
        norms = [float(factor.double().norm()) for factor in (factors.up, factors.down)]
        if not norms[0] * norms[1] <= _LARGEST:
            raise ValueError(f"{layer}: its factors stand for values that are not finite")
