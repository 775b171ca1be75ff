"""What a reader found in a file, before a base model makes it a concept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..concept.concept import Delta
from ..concept.plain import plain_text

_LONGEST_NAME = 200

Rows = Mapping[int, Tensor]
"""Width of a text encoder → a word's embedding in it, (vectors, width)"""


@dataclass
class Found:
    """The parts of a concept in the file of another tool."""

    title: str
    """What the file is, for people"""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Whole matrices by layer, (out, in): the base has to be subtracted"""
    deltas: dict[str, Delta] = field(default_factory=dict)
    """Changes by layer"""
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    """DoRA's, by layer: the norms of the rows (out) or (out, 1), or of the columns (1, in), of base
    and change together
    """
    tokens: dict[str, Rows] = field(default_factory=dict)
    """By modifier token"""
    notes: list[str] = field(default_factory=list)
    """What a concept cannot hold and was left out, or only comes near"""

    def leave_out(self, what: str, names: list[str]) -> None:
        if names:
            first = plain_text(names[0], _LONGEST_NAME)
            self.notes.append(f"{len(names)} {what} were left out, {first} for one")


def modifier_token(name: str) -> str:
    """A well-formed token of any name: `my cat.v2` → `<my-cat-v2>`."""
    inner = re.sub(r"[^\w-]+", "-", name.strip("<> ")).strip("-")[:_LONGEST_NAME]
    return f"<{inner or 'new1'}>"


def rows(*embeddings: Tensor) -> Rows:
    """Each text encoder's tensor, (width) or (vectors, width), by its width."""
    matrices = [torch.atleast_2d(embedding.detach()) for embedding in embeddings]
    return {matrix.shape[-1]: matrix for matrix in matrices}
