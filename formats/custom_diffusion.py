"""Custom Diffusion weights of the other implementations: CompVis, Adobe's diffusers port, Hugging
Face's training script, and the extension for A1111.

Most hold whole matrices, not changes, so a base model is needed to read them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..concept.checks import MOST_WORDS
from ..concept.delta import Delta, DenseDelta, LowRankDelta
from ..concept.errors import ConceptFileError
from ..concept.layers import FAMILIES, is_projection
from ..concept.plain import plain_text, read_json
from .content import ENDINGS, Content, container, read_content, tensors_of
from .found import Found
from .names import layer_of, layer_of_hugging_face
from .relative import Whole

_LONGEST_NAME = 200
_LARGEST_WORD = 1 << 20
"""Bytes of a file beside the weights that may be a word; a hundred vectors take half of it"""


def read_compvis(content: Content) -> Found | None:
    """`delta_*.ckpt` of the original code: whole matrices and, in one table, all new words."""
    state = dict(content.part("state_dict"))
    words = state.pop("embed", None)
    found = Found("a delta of the original Custom Diffusion code (CompVis)")
    _take_matrices(found, state, "state_dict")
    if isinstance(words, Tensor) and words.ndim == 2:
        # The file has no names. The code numbers its words <new1>, <new2> and so on.
        for number, row in enumerate(words, 1):
            found.add_word(f"<new{number}>", row)
        found.used.add("state_dict/embed")
    return found if found.relative or found.deltas else None


def read_adobe(content: Content) -> Found | None:
    """`delta.bin` of the authors' diffusers port, for SD and SDXL."""
    unet, words = content.part("unet"), content.part("modifier_token")
    if not unet and not words:
        return None
    found = Found("a delta of Adobe's Custom Diffusion (diffusers)")
    _take_matrices(found, unet, "unet")
    for name, value in words.items():
        tensors = list(value) if isinstance(value, list | tuple) else [value]
        if not tensors or not all(isinstance(t, Tensor) for t in tensors):
            raise ValueError(f"the word {name} is no embedding")
        found.add_word(name, *tensors)
    found.used.add("modifier_token")
    encoders = [name for name in ("text_encoder", "text_encoder_2") if content.part(name)]
    found.leave_out("trained text encoders", encoders)
    return found


def read_hugging_face(content: Content) -> Found | None:
    """`pytorch_custom_diffusion_weights` and, beside it, a file for each word."""
    found = read_processors(content)
    if found is None:
        return None
    files = word_files(content.path)
    if len(files) > MOST_WORDS:
        raise ValueError(
            f"{len(files)} files beside it may each be a word; {MOST_WORDS} are the most"
        )
    for path in files:
        try:
            _take_word(found, path)
        except (ConceptFileError, ValueError) as error:
            shown = plain_text(path.name, _LONGEST_NAME)
            found.notes.append(f"{shown} beside it is left out: {error}")
    return found


def _take_word(found: Found, path: Path) -> None:
    """The word in a file that holds it alone and is called like it; others may lie there too.

    Raises ConceptFileError and ValueError for a word's file that cannot be used.
    """
    words = read_content(path).tensors()
    name, *others = words or [""]
    if others or name.strip("<>") != path.stem.strip("<>"):
        return
    reads = {change.shape[1] for layer, change in found.relative.items() if is_projection(layer)}
    families = [family for family in FAMILIES.values() if family.context_width in reads]
    width = words[name].shape[-1] if words[name].ndim else 0
    if all({*family.text_encoders.values()} != {width} for family in families):
        raise ValueError(f"its embedding has width {width}, that of another model")
    found.add_word(name, words[name])


def read_processors(content: Content) -> Found | None:
    """The same without the words, for which other files have to be read."""
    found = Found("Custom Diffusion weights of Hugging Face's diffusers")
    beyond = []
    for name, tensor in content.tensors().items():
        layer = layer_of_hugging_face(name.removesuffix(".weight"))
        if layer and name.endswith(".weight"):
            found.relative[layer] = _whole(name, tensor)
            found.used.add(name)
        elif "_custom_diffusion" in name:
            beyond.append(name)
    found.leave_out("biases and other tensors", beyond)
    return found if found.relative else None


def word_files(weights: Path) -> list[Path]:
    """Files beside the weights that may hold a word each: those called `<new1>`, and in a folder
    that diffusers wrote every small one.
    """
    beside = [p for ending in ENDINGS for p in weights.parent.glob(f"*{ending}") if p != weights]
    own_folder = weights.stem == "pytorch_custom_diffusion_weights"
    return sorted(p for p in beside if p.stem.startswith("<") or (own_folder and _is_small(p)))


def _is_small(path: Path) -> bool:
    """Whether it is a file of a size that words have; links that lead nowhere are not."""
    try:
        return os.path.isfile(path) and path.stat().st_size < _LARGEST_WORD
    except OSError:  # it has gone meanwhile
        return False


def read_a1111_delta(content: Content) -> Found | None:
    """The extension's .safetensors: changes, whole or as factors, told apart by the header."""
    try:
        header = container(read_json(content.metadata.get("json", "{}")))
    except ValueError as error:
        raise ValueError(f"its header is no JSON ({error})") from error
    entries, tensors = container(header.get("entries")), content.tensors()
    if not entries:
        return None
    found = Found("a delta of A1111's Custom Diffusion extension")
    beyond = []
    for name, kind in entries.items():
        layer = layer_of(name.removesuffix(".weight"))
        parts = [name] if kind == "delta" else [f"{name}.US", f"{name}.Vh"]
        if layer is None:
            beyond.append(name)
            found.left.update(parts)
            continue
        missing = [part for part in parts if part not in tensors]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        delta = _delta(*(tensors[part] for part in parts))
        found.used.update(parts)
        if delta is not None:
            found.deltas[layer] = delta
    found.leave_out("entries of other layers", beyond)
    return found


def _take_matrices(found: Found, named: Mapping[str, Any], place: str) -> None:
    """Whole matrices, or the `u` and `v` of compressed changes, of cross-attention; all of them lie
    in the container `place` of the file.
    """
    beyond = []
    for name, value in named.items():
        layer = layer_of(name.removesuffix(".weight"))
        factors = tensors_of(container(value))
        if layer is None or not (isinstance(value, Tensor) or factors.keys() == {"u", "v"}):
            beyond.append(name)
            continue
        found.used.add(f"{place}/{name}")
        if isinstance(value, Tensor):
            found.relative[layer] = _whole(name, value)
        elif delta := _delta(factors["u"], factors["v"]):
            found.deltas[layer] = delta
    found.leave_out("tensors of other layers", beyond, [f"{place}/{name}" for name in beyond])


def _whole(name: str, weight: Tensor) -> Whole:
    if weight.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}; a matrix is needed")
    return Whole(weight)


def _delta(*factors: Tensor) -> Delta | None:
    """The change; None where the file's compression left nothing of it."""
    if any(factor.ndim != 2 for factor in factors):
        raise ValueError(f"it holds {tuple(factors[0].shape)} where a matrix is needed")
    if len(factors) == 1:
        return DenseDelta(factors[0])
    up, down = factors
    if up.shape[1] != down.shape[0]:
        raise ValueError(
            f"its factors of shapes {tuple(up.shape)} and {tuple(down.shape)} do not chain"
        )
    return LowRankDelta(up, down) if up.shape[1] else None
