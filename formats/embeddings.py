"""Textual-inversion embeddings: a concept that is a word and nothing else."""

from __future__ import annotations

import re

from torch import Tensor

from ..concept.layers import FAMILIES
from .content import Content, tensors_of
from .found import Found

_PAIRS = {"clip_l", "clip_g", "text_encoders_0", "text_encoders_1"}
"""Of SDXL, as most tools and as the first scripts for pivotal tuning (`.pti`) call them"""
_OUTPUT = {"clip_l_out", "clip_g_out"}
"""OneTrainer's vectors for what comes out of a text encoder, where a concept has no place"""
_NAMELESS = {"emb_params", "*", ""}
_WIDTHS = {width for family in FAMILIES.values() for width in family.text_encoders.values()}
_KNOWN = _PAIRS | _OUTPUT | _NAMELESS
_PARAMETER = re.compile(r"\.(weight|bias)$")
_PART_OF_A_NETWORK = re.compile(r"\.|^(clip|t5|text_encoder)")


def read_embeddings(content: Content) -> Found | None:
    """A1111's `.pt`, diffusers' `{token: rows}`, and .safetensors of both, SDXL's pairs too."""
    found = Found("a textual-inversion embedding")
    params = tensors_of(content.part("string_to_param"))
    if params:
        name = content.values.get("name")
        word = name if isinstance(name, str) and name else content.path.stem
        found.add_word(word, *params.values())
        found.used = {"string_to_param", "string_to_token"}
        return found
    tensors = content.tensors()
    if not tensors or len(tensors) != len(content.values):
        return None
    odd = next((n for n, t in tensors.items() if not _is_embedding(t)), None)
    if odd is not None and tensors.keys() <= _KNOWN:
        raise ValueError(
            f"{odd} has shape {tuple(tensors[odd].shape)}; a row or a matrix as wide as a text "
            f"encoder is needed, one of {sorted(_WIDTHS)}"
        )
    if odd is not None:
        return None
    named = {name: tensor for name, tensor in tensors.items() if name not in _OUTPUT}
    if not named:
        raise ValueError(
            "it holds vectors for a text encoder's output alone, which no word of a prompt stands "
            "for. Train it as an ordinary embedding"
        )
    if named.keys() <= _PAIRS:
        found.add_word(content.path.stem, *named.values())
    elif _are_words(named):
        for name, tensor in named.items():
            found.add_word(content.path.stem if name in _NAMELESS else name, tensor)
    else:
        return None
    found.used = set(named)
    found.leave_out("vectors for a text encoder's output", [n for n in tensors if n not in named])
    return found


def _is_embedding(tensor: Tensor) -> bool:
    return tensor.ndim in (1, 2) and tensor.shape[-1] in _WIDTHS


def _are_words(named: dict[str, Tensor]) -> bool:
    """Whether the names are those of words, and not of a network's parameters."""
    if any(_PARAMETER.search(name) for name in named):
        return False
    if len(named) == 1 or all(name.startswith("<") for name in named):
        return True
    return not any(_PART_OF_A_NETWORK.search(name) for name in named)
