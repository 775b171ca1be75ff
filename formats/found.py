"""What a reader found in a file, before a base model makes it a concept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..concept.delta import Delta
from ..concept.plain import plain_text
from .relative import Relative

_LONGEST_NAME = 200
_DEEPEST = 3
"""Names in a place that stands for all below it; those of tensors may hold any number of slashes"""

Rows = Mapping[int, Tensor]
"""Width of a text encoder → a word's embedding in it, (vectors, width)"""


@dataclass
class Found:
    """The parts of a concept in the file of another tool, and what became of every tensor there.

    Tensors are named by their path in the file, `state_dict/embed`; a path also stands for all that
    lies below it.
    """

    title: str
    """What the file is, for people"""
    deltas: dict[str, Delta] = field(default_factory=dict)
    """Changes by layer"""
    relative: dict[str, Relative] = field(default_factory=dict)
    """By layer, what is no change without a base model"""
    tokens: dict[str, Rows] = field(default_factory=dict)
    """By modifier token"""
    notes: list[str] = field(default_factory=list)
    """What a concept cannot hold and was left out, or only comes near"""
    used: set[str] = field(default_factory=set)
    """Paths of what the concept is made of"""
    left: set[str] = field(default_factory=set)
    """Paths of what the notes say was left out"""

    def leave_out(self, what: str, names: list[str], paths: Iterable[str] | None = None) -> None:
        """Notes it; `paths` where the names are not the paths themselves."""
        if not names:
            return
        self.left.update(names if paths is None else paths)
        first = plain_text(names[0], _LONGEST_NAME)
        self.notes.append(f"{len(names)} {what} were left out, {first} for one")

    def add_word(self, name: str, *embeddings: Tensor) -> None:
        """A word of any name, with each text encoder's tensor, (width) or (vectors, width).

        Names that a modifier token cannot have are changed; where two become one, the second gets a
        number. Raises ValueError where they are no embedding.
        """
        clean = token = modifier_token(name)
        number = 1
        while token in self.tokens:
            number += 1
            token = f"{clean[:-1]}-{number}>"
        if number > 1:
            shown = plain_text(name, _LONGEST_NAME)
            self.notes.append(
                f"the word {shown!r} would be called {clean} like another one in the file; it is "
                f"called {token} here"
            )
        self.tokens[token] = rows(*embeddings)

    def account(self, paths: Iterable[str]) -> tuple[int, int]:
        """Notes what of the file's tensors was neither used nor left out.

        Returns how many there are, and how many were used.
        """
        every = list(paths)
        used = [path for path in every if _below(path, self.used)]
        known = {*used, *(path for path in every if _below(path, self.left))}
        self.leave_out("tensors that no reader knows", [p for p in every if p not in known])
        return len(every), len(used)


def _below(path: str, places: set[str]) -> bool:
    """Whether the path is one of the places or lies below one."""
    parts = path.split("/", _DEEPEST)[:_DEEPEST]
    return path in places or any(
        "/".join(parts[:end]) in places for end in range(1, len(parts) + 1)
    )


def modifier_token(name: str) -> str:
    """A well-formed token of any name: `my cat.v2` → `<my-cat-v2>`."""
    inner = re.sub(r"[^\w-]+", "-", name.strip("<> ")).strip("-")[:_LONGEST_NAME]
    return f"<{inner or 'new1'}>"


def rows(*embeddings: Tensor) -> Rows:
    """Each text encoder's tensor, (width) or (vectors, width), by its width. Raises ValueError
    where they are no embedding, or two for one text encoder.
    """
    by_width: dict[int, Tensor] = {}
    for embedding in embeddings:
        if embedding.ndim not in (1, 2):
            raise ValueError(
                f"an embedding has shape {tuple(embedding.shape)}; a row or a matrix is needed"
            )
        matrix = torch.atleast_2d(embedding.detach())
        if matrix.shape[-1] in by_width:
            raise ValueError(
                f"a word has two embeddings of width {matrix.shape[-1]}, and nothing says which of "
                "them counts"
            )
        by_width[matrix.shape[-1]] = matrix
    return by_width
