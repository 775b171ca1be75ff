"""Prompts whose features know which rows are a concept's own words: the encoding side of routing.

The rows come from the tokens that are encoded, after prompt weights have been read and chunks of 77
have been cut, so neither can hide a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ...composition.features import mark, marks_of, plain
from ...composition.routing import own_words
from ...concept.concept import Concept
from ...concept.prompts import own_positions
from .tokenizer import rows_of_words

_UNKNOWN = -1
"""Stands for an embedding that is no word of a concept"""


@dataclass(frozen=True)
class Words:
    """The words of concepts as one text encoder's tokenizer writes them."""

    name: str
    """Key of this encoder's tokens in ComfyUI: l, g or h"""
    width: int
    """Of an embedding; ComfyUI leaves those of another width out of a prompt"""
    end: int
    """The token after which a chunk has only padding"""
    symbols: Mapping[int, int]
    """`id` of a word's row → a number below `_UNKNOWN`"""
    by_concept: Mapping[str, Sequence[tuple[Sequence[int], Sequence[int]]]]
    """Key of a concept → numbers of a token and of the noun that may follow it, either may lack"""

    @staticmethod
    def of(tokenizer: Any, encoder: str, concepts: Mapping[str, Concept]) -> Words:
        """`tokenizer` is that of one encoder (`clip_l`) and knows the concepts' tokens."""
        known = rows_of_words(tokenizer)
        every = [row for rows in known.values() for row in rows]
        symbols = {id(row): _UNKNOWN - 1 - number for number, row in enumerate(every)}

        def numbers(token: str, noun: str) -> tuple[list[int], list[int]]:
            plain_ids = tokenizer.tokenizer(noun)["input_ids"][1:-1] if noun else []
            return [symbols[id(row)] for row in known.get(token, ())], list(plain_ids)

        return Words(
            encoder.removeprefix("clip_"),
            tokenizer.embedding_size,
            tokenizer.end_token,
            symbols,
            {key: [numbers(*pair) for pair in own_words(c)] for key, c in concepts.items()},
        )

    def rows(self, chunks: Sequence[Sequence[Any]]) -> dict[str, list[int]]:
        """Key of a concept → rows of the features at which its words stand.

        `chunks` are lists of (token or embedding, weight, …), as they are encoded.
        """
        content, places = self.content(chunks)
        return {
            key: [places[i] for token, noun in pairs for i in own_positions(content, token, noun)]
            for key, pairs in self.by_concept.items()
        }

    def overlaps(self) -> list[tuple[str, str]]:
        """Pairs of concepts of which one has a word within the words of the other."""
        return [
            (key, other)
            for key, pairs in self.by_concept.items()
            for other, others in self.by_concept.items()
            if key != other
            and any(own_positions([*t, *n], *words) for t, n in pairs for words in others)
        ]

    def content(self, chunks: Sequence[Sequence[Any]]) -> tuple[list[int], list[int]]:
        """Numbers of what is said, chunk after chunk without start, end and padding, and the rows
        of the features where it is. So a phrase that a border cuts in two is one again.
        """
        content: list[int] = []
        places: list[int] = []
        first = 0
        for chunk in chunks:
            tokens = [entry[0] for entry in chunk]
            kept = [t for t in tokens if not isinstance(t, Tensor) or t.shape[-1] == self.width]
            for place, token in enumerate(kept[1:], first + 1):
                number = int(token) if isinstance(token, Integral) else self._symbol(token)
                if number == self.end:
                    break
                content.append(number)
                places.append(place)
            first += len(tokens)
        return content, places

    def _symbol(self, embedding: Any) -> int:
        return self.symbols.get(id(embedding), _UNKNOWN)


class MarkingTextModel:
    """A CLIP's text models, to all appearances the ones it was made of; but what it encodes has
    marks. The models themselves stay as they are, for the CLIPs that share them.
    """

    def __init__(self, model: Any, words: Sequence[Words]) -> None:
        vars(self).update(_model=model, _words=words)

    @property  # type: ignore[misc]  # ComfyUI and this pack ask what kind of model it is
    def __class__(self) -> type:
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        if name in ("_model", "_words"):  # while it is copied it has neither
            raise AttributeError(name)
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

    def encode_token_weights(self, tokens: Mapping[str, Any]) -> tuple[Any, ...]:
        """(features (1, n, d), pooled, …) as ever, the features as `MarkedFeatures`."""
        features, *others = self._model.encode_token_weights(tokens)
        own = {key: torch.zeros_like(plain(features)) for key in self._words[0].by_concept}
        for words in self._words:
            for key, rows in words.rows(tokens[words.name]).items():
                for row in rows:
                    if row < features.shape[1]:  # SDXL cuts to the shorter of two texts
                        own[key][:, row] = plain(features)[:, row]
        return mark(plain(features), {**marks_of(features), **own}), *others
