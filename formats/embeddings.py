"""Textual-inversion embeddings: a concept that is a word and nothing else."""

from __future__ import annotations

from torch import Tensor

from ..concept.layers import FAMILIES
from .content import Content, tensors_of
from .found import Found, Rows, modifier_token, rows

_ENCODERS = ("clip_l", "clip_g")
_NAMELESS = ("emb_params", "*", "", *_ENCODERS)
_WIDTHS = {width for family in FAMILIES.values() for width in family.text_encoders.values()}


def read_embeddings(content: Content) -> Found | None:
    """A1111's `.pt`, diffusers' `{token: rows}`, and .safetensors of both, SDXL's pairs too."""
    found = Found("a textual-inversion embedding")
    params = tensors_of(content.part("string_to_param"))
    if params:
        name = content.values.get("name")
        word = name if isinstance(name, str) and name else content.path.stem
        found.tokens = {modifier_token(word): _rows(*params.values())}
        return found
    tensors = content.tensors()
    if not tensors or len(tensors) != len(content.values):
        return None
    if not all(t.ndim in (1, 2) and t.shape[-1] in _WIDTHS for t in tensors.values()):
        return None
    if tensors.keys() <= {*_ENCODERS}:
        found.tokens = {modifier_token(content.path.stem): _rows(*tensors.values())}
    elif len(tensors) == 1 or all(name.startswith("<") for name in tensors):
        for name, tensor in tensors.items():
            word = content.path.stem if name in _NAMELESS else name
            found.tokens[modifier_token(word)] = _rows(tensor)
    return found if found.tokens else None


def _rows(*embeddings: Tensor) -> Rows:
    if any(e.ndim not in (1, 2) for e in embeddings):
        raise ValueError("its embedding is neither a row nor a matrix")
    return rows(*embeddings)
