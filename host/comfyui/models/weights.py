"""Weights of ComfyUI's models as copies, with the patches that lie on them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sd1_clip
import comfy.sdxl_clip
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn

from ....concept.errors import IncompatibleModelError
from ....concept.layers import Family, family_of_width, is_cross_attention, is_projection
from ....formats.base import BaseModel

_UNET_PREFIX = "diffusion_model."
_SAMPLED = 4096
"""Entries of each weight that a fingerprint looks at"""
_MAY_BE_EMPTY = ("text_projection.weight", "logit_scale")
"""Checkpoints of SD 1 and 2 have none: ComfyUI leaves there what the memory held, unread"""
DtypeOf = Callable[[str, Tensor], torch.dtype]


def cross_attention_unet(model: Any) -> UNetModel:
    """The UNet of a MODEL; raises IncompatibleModelError when it has no cross-attention."""
    network = model.model.diffusion_model
    if not isinstance(network, UNetModel) or not _projections(network):
        raise IncompatibleModelError(
            f"This model is a {type(network).__name__} ({type(model.model).__name__}), which has "
            "no cross-attention with key and value projections. Custom Diffusion needs a Stable "
            "Diffusion UNet: load a checkpoint of SD 1.x, SD 2.x or SDXL."
        )
    return network


def unet_family(network: UNetModel) -> Family:
    """The family of a UNet, from the width of the text features it reads."""
    path = next(iter(_projections(network).values()))
    return family_of_width(network.get_submodule(path).in_features)  # weights may be packed


def each_patched_weight(
    patcher: Any,
    prefix: str,
    dtype_of: DtypeOf = lambda name, weight: weight.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """Copies of the weights below `prefix`, one after the other, on the CPU, with the patches
    (LoRAs) applied.

    Numbers that are stored with a scale come as what they stand for. `dtype_of` says what a weight
    is cast to, at once: two copies of a whole model would be the peak of memory.

    Raises IncompatibleModelError where they are quantised in a way that ComfyUI does not know.

    ComfyUI's `get_key_patches` gives the same, but not of a model whose state has keys beside its
    parameters, as scales are.
    """
    for key, _ in patcher.model.named_parameters():
        if key.startswith(prefix):
            _check_computable(patcher.model, key)
            name, copy = key.removeprefix(prefix), _patched(patcher, key)
            yield name, copy.to(dtype_of(name, copy))


def shared_weights(before: Any, after: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Copies of the weights of two MODELs' networks that both have, patches applied, one name
    after the other.
    """
    theirs = dict(after.model.named_parameters())
    for key, _ in before.model.named_parameters():
        if key.startswith(_UNET_PREFIX) and key in theirs:
            for patcher in (before, after):
                _check_computable(patcher.model, key)
            yield key.removeprefix(_UNET_PREFIX), _patched(before, key), _patched(after, key)


def patched_weights(patcher: Any, prefix: str, *dtype_of: DtypeOf) -> dict[str, Tensor]:
    """`each_patched_weight`, all at once."""
    return dict(each_patched_weight(patcher, prefix, *dtype_of))


def patched_fingerprint(patcher: Any) -> str:
    """Of all weights of a UNet, text encoder or autoencoder with its patches, by some thousand
    entries of each: equal in the next session, too.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in each_patched_weight(patcher, ""):
        if name.endswith(_MAY_BE_EMPTY):
            continue
        flat = weight.reshape(-1)
        some = flat[:: max(1, len(flat) // _SAMPLED)].half()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def _patched(patcher: Any, key: str) -> Tensor:
    weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
    if key in patcher.backup:
        weight = patcher.backup[key].weight
    if key in patcher.hook_backup:
        weight = patcher.hook_backup[key][0]
    copy: Tensor = weight.detach().to("cpu", copy=True)
    if convert is not None:
        copy = convert(copy, inplace=True)
    if key in patcher.patches:
        changed = comfy.lora.calculate_weight(patcher.patches[key], copy.float(), key)
        copy = changed.to(weight.dtype)
    return copy


def _check_computable(model: nn.Module, key: str) -> None:
    """Raises IncompatibleModelError for packed whole numbers, whose meaning another extension
    knows, and for a matrix of another shape than its layer's.
    """
    path, _, name = key.rpartition(".")
    layer, weight = model.get_submodule(path), model.get_parameter(key)
    shape = [getattr(layer, size, None) for size in ("out_features", "in_features")]
    odd = name == "weight" and None not in shape and list(weight.shape) != shape
    if odd or not weight.is_floating_point():
        stored = f"{str(weight.dtype).removeprefix('torch.')} {tuple(weight.shape)}"
        raise IncompatibleModelError(
            f"This model's weights are quantised, as in a GGUF file: {key} is stored as {stored}. "
            f"They are rounded by more than a concept changes them, and cannot be computed with "
            f"here. Load the same model from a .safetensors."
        )


def base_model(model: Any) -> BaseModel:
    """Copies of the cross-attention of a MODEL's UNet, patches applied. Raises
    IncompatibleModelError as `patched_weights` does.
    """
    network = cross_attention_unet(model)
    layers = [path for path, _ in network.named_modules() if is_cross_attention(path)]
    return BaseModel({k: patched_weights(model, f"{_UNET_PREFIX}{k}.")["weight"] for k in layers})


def _projections(network: nn.Module) -> dict[str, str]:
    return {path: path for path, _ in network.named_modules() if is_projection(path)}
