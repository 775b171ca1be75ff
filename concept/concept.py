"""`Concept`: what was learnt. Training, merging and importing make one; applying and saving take
one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor

from .delta import Delta
from .errors import TokenError
from .layers import FAMILIES, Family, sort_layers
from .plain import plain_words
from .prompts import check_modifier_token

SAME_WORD_DISTANCE = 1e-2
"""Words whose vectors are closer than this, relative to their length, are one word"""

_SHOWN = 6
"""Edited words that a description names"""

Scope = Literal["every word", "own words"]
"""The words of a prompt through which a concept was taught: all of them, or its own alone, V* and
the class noun (spliced training). What changes at other words means nothing then.
"""


@dataclass(frozen=True)
class ModifierToken:
    """A new word and what it means to each text encoder."""

    name: str
    class_noun: str
    embeddings: Mapping[str, Tensor]
    """Text encoder name → (vectors, width); a modifier token of Custom Diffusion has one vector."""
    initializer: str = ""

    def __post_init__(self) -> None:
        check_modifier_token(self.name)

    def to(self, dtype: torch.dtype) -> ModifierToken:
        return replace(self, embeddings={k: v.to(dtype) for k, v in self.embeddings.items()})


@dataclass(frozen=True, repr=False)
class Concept:
    """KV deltas by layer, modifier tokens, and where they came from."""

    family: Family
    deltas: Mapping[str, Delta]
    tokens: tuple[ModifierToken, ...] = ()
    base_hash: str = ""
    """`hash_projections` of the base model's key and value projections."""
    constraint_prompts: tuple[str, ...] = ()
    """Prompts that a merge must keep, `<new1> cat` and the like."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What made it, as plain JSON values: method, steps, configuration, losses, parents."""
    scope: Scope = "every word"

    def __post_init__(self) -> None:
        names: set[str] = set()
        for name in (token.name for token in self.tokens):
            if name in names:
                raise TokenError(
                    f"Two concepts use the trigger word {name}; it can mean only one thing. "
                    "Rename one of them (in ComfyUI with Load Concept's new_trigger_word, with "
                    "--tokens of `custom-diffusion merge`), or train it with another trigger word."
                )
            names.add(name)

    def __repr__(self) -> str:
        """Short: ComfyUI puts the inputs of a node that fails into its error message."""
        return f"Concept({self.describe()})"

    @property
    def layers(self) -> list[str]:
        return sort_layers(self.deltas)

    def embeddings(self) -> dict[str, dict[str, Tensor]]:
        """Text encoder name → token name → (vectors, width)."""
        return {
            encoder: {token.name: token.embeddings[encoder] for token in self.tokens}
            for encoder in self.family.text_encoders
        }

    def to(self, dtype: torch.dtype) -> Concept:
        return replace(
            self,
            deltas={layer: delta.to(dtype) for layer, delta in self.deltas.items()},
            tokens=tuple(token.to(dtype) for token in self.tokens),
        )

    def with_token(self, name: str) -> Concept:
        """The same concept with its one modifier token called `name`, in its prompts too."""
        if len(self.tokens) != 1:
            raise TokenError(
                f"Only a concept with one trigger word can be renamed to {name}; this is "
                f"{self.describe()}. Rename the concepts before merging them."
            )
        (token,) = self.tokens
        prompts = tuple(prompt.replace(token.name, name) for prompt in self.constraint_prompts)
        return replace(self, tokens=(replace(token, name=name),), constraint_prompts=prompts)

    def describe(self) -> str:
        """One line for messages and lists."""
        tokens = ", ".join(f"{t.name} {t.class_noun}".strip() for t in self.tokens)
        tokens = tokens or edited_words(self.provenance) or "no word"
        return f"{tokens} ({FAMILIES[self.family.name].title}, {len(self.deltas)} projections)"


def edited_words(provenance: Mapping[str, Any]) -> str:
    """`edit of square, red`: what Edit Concepts changed; empty for other concepts. It may come from
    somebody else's file.
    """
    edits = provenance.get("edits")
    named = (
        [edit.get("word") for edit in edits if isinstance(edit, Mapping)]
        if isinstance(edits, list)
        else []
    )
    words = [word for word in named if isinstance(word, str)]
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return plain_words(f"edit of {', '.join(words[:_SHOWN])}{more}") if words else ""


def same_vectors(rows: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether two words (text encoder name → (vectors, width)) are one to every text encoder, up to
    what half precision rounds.
    """
    for name, row in rows.items():
        one, other = row.detach().float(), others[name].detach().to(row.device).float()
        if one.shape != other.shape or (one - other).norm() > SAME_WORD_DISTANCE * one.norm():
            return False
    return True


def alike_tokens(tokens: Sequence[ModifierToken]) -> list[tuple[str, str]]:
    """Names of every two tokens that no prompt can tell apart, whatever they are called."""
    return [
        (one.name, other.name)
        for one, other in combinations(tokens, 2)
        if same_vectors(one.embeddings, other.embeddings)
    ]


def hash_projections(weights: Mapping[str, Tensor]) -> str:
    """Fingerprint of a base model: its key and value projections, rounded to half precision."""
    digest = hashlib.blake2b(digest_size=16)
    for layer in sort_layers(weights):
        digest.update(layer.encode())
        digest.update(
            weights[layer].detach().to("cpu", torch.float16).contiguous().numpy().tobytes()
        )
    return digest.hexdigest()
