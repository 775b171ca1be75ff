"""One module of a LoRA or LyCORIS file: what its tensors are called, and the change that they stand
for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..concept.delta import Delta, DenseDelta, LowRankDelta
from .relative import Decomposed, Generalized, Relative, Scaled, Turned

Parts = Mapping[str, Tensor]
Scale = Callable[[str, int], float]
"""What a module, by its name, and the rank of its factors are multiplied by"""

_ADAPTER = r"(?:\.(?!weight$|bias$)[\w-]+)?"
"""The name that PEFT gave an adapter"""
# How the tools call one thing. A part is called as it ends; what is listed first counts.
_ENDS = tuple(
    (part, re.compile(rf"(?:{ends})$"))
    for part, ends in {
        "up": r"\.lora_up\.weight|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight"
        rf"|\.lora_B{_ADAPTER}(?:\.weight)?",
        "down": r"\.lora_down\.weight|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight"
        rf"|\.lora_A{_ADAPTER}(?:\.weight)?",
        "magnitude": rf"\.dora_scale|\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?",
        "bias": rf"\.diff_b|\.lora_B{_ADAPTER}\.bias",
        **{
            part: re.escape(f".{part}")
            for part in (
                *("alpha", "diff", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
                *("hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2"),
                *("lokr_w2_a", "lokr_w2_b", "lokr_t2", "lora_mid.weight", "reshape_weight"),
                *("set_weight", "oft_blocks", "rescale", "on_input", "ia3_l"),
                *("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
            )
        },
    }.items()
)
_HADAMARD = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_GENERALIZED = {"a1.weight", "a2.weight", "b1.weight", "b2.weight"}
_BESIDE = {"alpha", "magnitude", "bias", "on_input", "rescale"}
"""Parts that are no factors"""


def split_name(name: str) -> tuple[str, str] | None:
    """(module, part) of a tensor by its name; None where no known part ends it."""
    for part, end in _ENDS:
        if found := end.search(name):
            return name[: found.start()], part
    return None


def flattened(parts: Parts) -> dict[str, Tensor]:
    """The same with matrices for what was written as convolutions of one pixel."""
    return {
        part: tensor[..., 0, 0] if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor
        for part, tensor in parts.items()
    }


def made_shape(parts: Parts) -> tuple[int, int] | None:
    """(out, in) of the matrix that has to be made of one module's factors; None where they stay
    what they are. Raises ValueError where they are no factors.
    """
    kinds = parts.keys() - _BESIDE
    if kinds in ({"oft_blocks"}, {"weight"}, {"ia3_l"}):
        return None
    if any(parts[kind].ndim != 2 for kind in kinds):
        raise ValueError("its factors are not matrices")
    if kinds == _HADAMARD:
        first, second = (_product(parts, f"hada_w{number}") for number in (1, 2))
        if first != second:
            raise ValueError(f"its products {first} and {second} have different shapes")
        return first
    if not any(kind.startswith("lokr") for kind in kinds):
        return None
    first, second = (_product(parts, f"lokr_w{number}") for number in (1, 2))
    return first[0] * second[0], first[1] * second[1]


def check_floats(parts: Parts) -> None:
    """Raises ValueError where a module is made of other numbers."""
    for part in parts.keys() - _BESIDE:
        if not parts[part].is_floating_point():
            raise ValueError(f"its {part} is {parts[part].dtype}; floats are needed")


def read_relative(name: str, parts: Parts, scale: Scale | None) -> Relative | None:
    """What the parts of a module do to the base model's matrix; None where they are a change by
    themselves, `read_delta`'s. Raises ValueError.
    """
    known = _turned_or_scaled(name, parts, scale)
    if "magnitude" not in parts:
        return known
    if known is not None:
        raise ValueError(f"it has magnitudes beside {known.kind}, which no tool writes")
    return Decomposed(read_delta(name, parts, scale), parts["magnitude"])


def _turned_or_scaled(name: str, parts: Parts, scale: Scale | None) -> Relative | None:
    kinds = parts.keys() - _BESIDE
    if kinds == {"weight"} and "on_input" in parts:
        return Scaled(parts["weight"].flatten(), bool(parts["on_input"].item()))
    if kinds == {"ia3_l"} and parts["ia3_l"].ndim == 2 and 1 in parts["ia3_l"].shape:
        factors = parts["ia3_l"].float()  # PEFT's: of columns (1, in), or of rows (out, 1)
        return Scaled(factors.flatten() - 1, of_columns=len(factors) == 1)
    if kinds == {"oft_blocks"} and parts["oft_blocks"].ndim == 3:
        return _turned(name, parts)
    return _generalized(name, parts, scale) if kinds == _GENERALIZED else None


def read_delta(name: str, parts: Parts, scale: Scale | None) -> Delta:
    """The change that the parts of a module stand for; without `scale` its own alpha says how
    strong it is. Biases are left out. Raises ValueError.
    """
    kinds = parts.keys() - _BESIDE
    if kinds == {"up", "down"}:
        up, down = parts["up"], parts["down"]
        factor = _factor(name, parts, scale, _chain(up, down, "factors"))
        return LowRankDelta(up, down) if factor == 1 else LowRankDelta(up, down).scaled(factor)
    if kinds == {"diff"}:
        return DenseDelta(parts["diff"])
    if kinds == _HADAMARD:
        first, second = (_made(parts, f"hada_w{number}") for number in (1, 2))
        return DenseDelta(first * second * _factor(name, parts, scale, len(parts["hada_w1_b"])))
    if any(kind.startswith("lokr") for kind in kinds) and "lokr_t2" not in kinds:
        ranks = [len(parts[part]) for part in ("lokr_w2_b", "lokr_w1_b") if part in parts]
        # Two whole factors have no rank to divide by, and their alpha says nothing.
        whole = not ranks and scale is None
        strength = 1.0 if whole else _factor(name, parts, scale, *ranks[:1] or [1])
        first, second = (_made(parts, f"lokr_w{number}") for number in (1, 2))
        return DenseDelta(torch.kron(first * strength, second))
    raise ValueError(
        f"it is made of {', '.join(sorted(parts))}; LoRA, LoHa, LoKr, OFT, IA3, GLoRA, DoRA and "
        f"plain differences can be read, convolutions' factors and others cannot"
    )


def _turned(name: str, parts: Parts) -> Turned:
    """Its alpha bounds how far it turns: LyCORIS and kohya multiply it by the number of rows,
    ComfyUI's own trainer does not.
    """
    blocks = parts["oft_blocks"]
    if blocks.shape[1] != blocks.shape[2] or not blocks.numel():
        raise ValueError(f"its blocks {tuple(blocks.shape)} are not square")
    rescale = parts.get("rescale")
    rows = blocks.shape[0] * blocks.shape[1]
    if rescale is not None and rescale.numel() != rows:
        raise ValueError(f"it scales {rescale.numel()} rows and turns {rows}")
    bound = _alpha(parts) or 0.0
    own = name.startswith("diffusion_model.")
    return Turned(blocks, bound if own else bound * rows, rescale)


def _generalized(name: str, parts: Parts, scale: Scale | None) -> Generalized:
    """Of LyCORIS as it is, or as it was in its first versions, with all factors transposed."""
    a1, a2, b1, b2 = (
        parts[kind].float() for kind in ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
    )
    if not (b1.shape[1] == b2.shape[0] == a1.shape[1] == a2.shape[0]):
        a1, a2, b1, b2 = a2, a1, b2, b1
    rank = _chain(b1, b2, "factors")
    if _chain(a1, a2, "factors") != rank or len(a1) != a2.shape[1] or len(a1) != b2.shape[1]:
        raise ValueError("its factors do not belong together")
    factor = _factor(name, parts, scale, rank)
    return Generalized((a1 * factor, a2), (b1 * factor, b2))


def _factor(name: str, parts: Parts, scale: Scale | None, rank: int) -> float:
    if scale is not None:
        return scale(name, rank)
    alpha = _alpha(parts)
    return 1.0 if alpha is None else alpha / rank


def _alpha(parts: Parts) -> float | None:
    if "alpha" not in parts:
        return None
    if parts["alpha"].numel() != 1:
        raise ValueError(f"its alpha has {parts['alpha'].numel()} values; one is needed")
    alpha = float(parts["alpha"])
    if not math.isfinite(alpha):
        raise ValueError(f"its alpha is {alpha}, which is no strength")
    return alpha


def _product(parts: Parts, name: str) -> tuple[int, int]:
    """The shape of one factor, of which there may be two again."""
    if name in parts:
        return parts[name].shape[0], parts[name].shape[1]
    if f"{name}_a" not in parts or f"{name}_b" not in parts:
        raise ValueError(f"{name} is missing")
    before, after = parts[f"{name}_a"], parts[f"{name}_b"]
    _chain(before, after, name)
    return before.shape[0], after.shape[1]


def _made(parts: Parts, name: str) -> Tensor:
    if name in parts:
        return parts[name].float()
    return parts[f"{name}_a"].float() @ parts[f"{name}_b"].float()


def _chain(before: Tensor, after: Tensor, what: str) -> int:
    """The rank of two factors. Raises ValueError where they cannot be multiplied."""
    if before.ndim != 2 or after.ndim != 2 or before.shape[1] != len(after) or not len(after):
        raise ValueError(f"{what} {tuple(before.shape)} and {tuple(after.shape)} do not chain")
    return len(after)
