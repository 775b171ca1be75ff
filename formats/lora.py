"""LoRA and LyCORIS files, of which a concept takes what changes cross-attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..concept.checks import check_sizes
from ..concept.concept import Delta, DenseDelta, LowRankDelta
from ..concept.plain import read_json
from .content import Content, container, tensors_of
from .found import Found, modifier_token, rows
from .names import layer_of

# How the tools call one thing; the first that fits the end of a name counts.
_PARTS = {
    "up": (".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", "_lora.up.weight")
    + (".lora.up.weight", ".lora_linear_layer.up.weight"),
    "down": (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", "_lora.down.weight")
    + (".lora.down.weight", ".lora_linear_layer.down.weight"),
    "alpha": (".alpha",),
    "diff": (".diff",),
    "magnitude": (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")
    + (".lora_magnitude_vector.default.weight",),
    **{
        part: (f".{part}",)
        for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w1_a")
        + ("lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    },
    **{
        part: (f".{part}",)
        for part in ("hada_t1", "hada_t2", "lokr_t2", "lora_mid.weight", "diff_b")
        + ("reshape_weight", "set_weight")
    },
}
_BUNDLED = "bundle_emb."
_HADAMARD = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_SCALES = {"alpha", "magnitude"}
"""Parts that say how much, not what"""

Parts = Mapping[str, Tensor]


def read_lora(content: Content) -> Found | None:
    """LoRA (kohya, ComfyUI, diffusers, PEFT), LoHa, LoKr, DoRA of each, and plain differences."""
    tensors = content.tensors()
    modules = _modules(tensors)
    if not modules:
        return None
    scale = _peft_scale(content)
    found = Found("a LoRA")
    _take_modules(found, modules, scale)
    for name, tensor in tensors.items():
        if name.startswith(_BUNDLED) and tensor.ndim in (1, 2):
            word, _, _ = name.removeprefix(_BUNDLED).partition(".")
            token = modifier_token(word)
            found.tokens[token] = {**found.tokens.get(token, {}), **rows(tensor)}
    return found


def read_mix_of_show(content: Content) -> Found | None:
    """An ED-LoRA of Mix-of-Show. It has a row of each word for every layer; a concept has one."""
    params = content.part("params")
    unet, words = container(params.get("unet")), container(params.get("new_concept_embedding"))
    if not unet and not words:
        return None
    found = Found("an ED-LoRA of Mix-of-Show")
    # Its layers multiply by alpha, not by alpha / rank, and alpha is 1 in every released file.
    _take_modules(found, _modules(tensors_of(unet)), lambda _name, _rank: 1.0)
    for name, tensor in tensors_of(words).items():
        if tensor.ndim not in (1, 2):
            raise ValueError(f"the word {name} has shape {tuple(tensor.shape)}; a matrix fits")
        matrix = tensor.reshape(-1, tensor.shape[-1]).float()
        found.tokens[modifier_token(name)] = rows(matrix.mean(0))
        if len(matrix) > 1:
            found.notes.append(f"{name} has a row for each of {len(matrix)} layers: their mean")
    found.leave_out("modules of the text encoder", list(container(params.get("text_encoder"))))
    return found


def _modules(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module → part → tensor."""
    ends = [(end, part) for part, ends in _PARTS.items() for end in ends]
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        fitting = next(((end, part) for end, part in ends if name.endswith(end)), None)
        if fitting:
            end, part = fitting
            modules.setdefault(name.removesuffix(end), {})[part] = tensor
    return {m: parts for m, parts in modules.items() if parts.keys() != {"alpha"}}


def _take_modules(
    found: Found,
    modules: Mapping[str, Parts],
    scale: Callable[[str, int], float] | None,
) -> None:
    ours = {name: layer for name in modules if (layer := layer_of(name))}
    # Small factors can stand for large matrices: of all those that are made, the sizes come first.
    made: dict[str, tuple[int, ...]] = {}
    for name in ours:
        try:
            if shape := _shape_to_make(modules[name]):
                made[name] = shape
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    check_sizes(made)
    for name, layer in ours.items():
        try:
            found.deltas[layer] = _delta(name, modules[name], scale)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{name}: {error}") from error
        if "magnitude" in modules[name]:
            found.magnitudes[layer] = modules[name]["magnitude"]
    beyond = [name for name in modules if name not in ours]
    found.leave_out("modules that are not cross-attention", beyond)


def _shape_to_make(parts: Parts) -> tuple[int, ...] | None:
    """(out, in) of the matrix that has to be made of one module's factors; None where they stay
    what they are.
    """
    if any(parts[kind].ndim != 2 for kind in parts.keys() - _SCALES):
        raise ValueError("its factors are not matrices")
    if parts.keys() >= _HADAMARD:
        first, second = (_product(parts, f"hada_w{number}") for number in (1, 2))
        if first != second:
            raise ValueError(f"its products {first} and {second} have different shapes")
        return first
    if not any(kind.startswith("lokr") for kind in parts):
        return None
    first, second = (_product(parts, f"lokr_w{number}") for number in (1, 2))
    return first[0] * second[0], first[1] * second[1]


def _product(parts: Parts, name: str) -> tuple[int, int]:
    """The shape of one factor, of which there may be two again."""
    if name in parts:
        return parts[name].shape[0], parts[name].shape[1]
    if f"{name}_a" not in parts or f"{name}_b" not in parts:
        raise ValueError(f"{name} is missing")
    before, after = parts[f"{name}_a"], parts[f"{name}_b"]
    if before.shape[1] != after.shape[0] or not len(after):
        raise ValueError(f"{name}: {tuple(before.shape)} and {tuple(after.shape)} do not chain")
    return before.shape[0], after.shape[1]


def _delta(name: str, parts: Parts, scale: Callable[[str, int], float] | None) -> Delta:
    """The change that one module's tensors stand for."""
    factor = scale or (lambda _name, rank: float(parts["alpha"]) / rank if "alpha" in parts else 1)
    kinds = parts.keys() - _SCALES
    if kinds == {"up", "down"}:
        up, down = parts["up"], parts["down"]
        if up.shape[1] != down.shape[0] or not len(down):
            raise ValueError(f"factors {tuple(up.shape)} and {tuple(down.shape)} do not chain")
        return LowRankDelta(up, down).scaled(factor(name, len(down)))
    if kinds == {"diff"}:
        return DenseDelta(parts["diff"])
    if kinds == _HADAMARD:
        first = parts["hada_w1_a"].float() @ parts["hada_w1_b"].float()
        second = parts["hada_w2_a"].float() @ parts["hada_w2_b"].float()
        return DenseDelta(first.mul_(second).mul_(factor(name, len(parts["hada_w1_b"]))))
    if any(kind.startswith("lokr") for kind in kinds) and "lokr_t2" not in kinds:
        ranks = [len(parts[part]) for part in ("lokr_w2_b", "lokr_w1_b") if part in parts]
        # Two whole factors have no rank to divide by, and their alpha says nothing.
        strength = factor(name, ranks[0]) if ranks else 1.0
        first, second = (_kronecker_factor(parts, f"lokr_w{number}") for number in (1, 2))
        return DenseDelta(torch.kron(first * strength, second))
    raise ValueError(
        f"it is made of {', '.join(sorted(parts))}; LoRA, LoHa, LoKr, DoRA and plain differences "
        f"can be read, convolutions' factors cannot"
    )


def _kronecker_factor(parts: Parts, name: str) -> Tensor:
    if name in parts:
        return parts[name].float()
    return parts[f"{name}_a"].float() @ parts[f"{name}_b"].float()


def _peft_scale(content: Content) -> Callable[[str, int], float] | None:
    """alpha / rank, or alpha / √rank, as PEFT's settings in the header say; None where there are
    none.
    """
    text = content.metadata.get("lora_adapter_metadata")
    if text is None:
        return None
    try:
        settings: dict[str, Any] = dict(container(read_json(text)))
    except ValueError as error:
        raise ValueError(f"lora_adapter_metadata is no JSON ({error})") from error
    if settings.get("unet.use_dora") and not any("magnitude" in name for name in content.values):
        raise ValueError("its settings say DoRA, and it holds no magnitudes")
    stabilised = bool(settings.get("unet.use_rslora"))
    patterns = container(settings.get("unet.alpha_pattern"))
    alpha = settings.get("unet.lora_alpha")

    def scale(name: str, rank: int) -> float:
        path = name.removeprefix("unet.")
        own = next((a for key, a in patterns.items() if path.endswith(key)), alpha)
        return float(own) / (rank**0.5 if stabilised else rank) if own is not None else 1.0

    return scale
