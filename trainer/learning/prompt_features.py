"""Text features of a step's prompts, and where their keys and values may learn.

What is longer than an encoder reads at once is read in chunks, whose features stand one after the
other, as ComfyUI does it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...concept.prompts import own_positions
from ...concept.text import TextEncoder, TextFeatures
from ..config import GradientCut

MOST_CHUNKS = 8
"""Of a caption; each is as many tokens as CLIP reads at once"""
_KNOWN = 1024
"""Prompts whose tokens are kept: each is asked for several times a step"""


class PromptText(NamedTuple):
    """What a step reads of its prompts."""

    features: TextFeatures
    passing: Tensor | None
    """One where keys and values may pass gradients (b, n); None where all may"""
    own: Tensor | None
    """One where keys and values change at all (b, n); None where all do. On the CPU: which rows
    they are is asked at every step, and the answer would wait for all that a GPU has still to do.
    """

    def as_leaves(self) -> PromptText:
        """The same numbers, as tensors that gradients stop at."""
        context, pooled = self.features
        leaves = TextFeatures(_leaf(context), None if pooled is None else _leaf(pooled))
        return self._replace(features=leaves)

    def tensors(self) -> list[Tensor]:
        """Its features, those that there are."""
        return [features for features in self.features if features is not None]

    def pass_on(self, leaves: PromptText) -> None:
        """Gradients that the leaves of this have taken, to what it was made from."""
        reached = [
            (made_from, leaf.grad)
            for leaf, made_from in zip(leaves.tensors(), self.tensors(), strict=True)
            if leaf.grad is not None
        ]
        if reached:
            made_from, gradients = zip(*reached, strict=True)
            torch.autograd.backward(made_from, gradients)


class PromptFeatures:
    """Features of prompts: with a new token at every step, without one once."""

    def __init__(
        self,
        encoder: TextEncoder,
        words: Mapping[str, Iterable[str]],
        cut: GradientCut,
        subjects: Sequence[tuple[str, str]] = (),
    ) -> None:
        """`subjects` are the modifier token and the class noun of each concept."""
        self._encoder, self._cut, self._subjects = encoder, cut, subjects
        self._tokens = {token for tokens in words.values() for token in tokens}
        self._fixed: dict[str, TextFeatures] = {}
        self._chunks = lru_cache(_KNOWN)(self._divided)

    def encode(self, prompts: Sequence[str]) -> PromptText:
        """Features, and which of their rows learn."""
        unique = list(dict.fromkeys(prompts))
        learnt = [p for p in unique if any(token in p for token in self._tokens)]
        missing = [p for p in unique if p not in learnt and p not in self._fixed]
        with torch.no_grad():
            for prompt in missing:  # one by one: its numbers must not depend on its neighbours
                self._fixed.update(self._features([prompt]))
        features = {**self._fixed, **(self._features(learnt) if learnt else {})}
        context = _side_by_side([features[prompt].context for prompt in prompts])
        pooled = [row for prompt in prompts if (row := features[prompt].pooled) is not None]
        both = TextFeatures(context, torch.stack(pooled) if pooled else None)
        return PromptText(both, self._passing_rows(prompts, context), self._own(prompts, context))

    def _own(self, prompts: Sequence[str], context: Tensor) -> Tensor | None:
        if self._cut != "own words":
            return None
        own = [torch.zeros(self._length(prompt)) for prompt in prompts]
        for row, prompt in zip(own, prompts, strict=True):
            ids, places = self._words_of(prompt)
            for token, noun in self._subjects:
                found = own_positions(ids, self._words(token), self._words(noun))
                row[[places[word] for word in found]] = 1
        return _side_by_side(own)

    def word_rows(self, prompts: Sequence[str], context: Tensor) -> Tensor:
        """Where each concept's trigger word, and then its class noun, stand in each prompt: one
        there, else zero (b, 2 · concepts, n).
        """
        rows = []
        for prompt in prompts:
            of_prompt = torch.zeros(self._length(prompt), 2 * len(self._subjects))
            ids, places = self._words_of(prompt)
            for place, (token, noun) in enumerate(self._subjects):
                trigger = own_positions(ids, self._words(token), []) if token else []
                own = own_positions(ids, self._words(token), self._words(noun))
                of_prompt[[places[n] for n in trigger], 2 * place] = 1
                of_prompt[[places[n] for n in own if n not in trigger], 2 * place + 1] = 1
            rows.append(of_prompt)
        return _side_by_side(rows).transpose(1, 2).to(context.device)

    def _words(self, text: str) -> list[int]:
        return self._encoder.tokenize_words(text) if text else []

    def _divided(self, prompt: str) -> list[list[int]]:
        """Token ids with start and end of all that the encoder reads at once, one after the other,
        as ComfyUI divides a text without weights.
        """
        start, end = self._encoder.tokenize("")
        words, room = self._words(prompt), self._encoder.context_length - 2
        firsts = range(0, max(len(words), 1), room)
        return [[start, *words[first : first + room], end] for first in firsts]

    def _length(self, prompt: str) -> int:
        return len(self._chunks(prompt)) * self._encoder.context_length

    def _words_of(self, prompt: str) -> tuple[list[int], list[int]]:
        """A prompt's words without starts and ends, and the rows of its features where they stand:
        a phrase that a chunk's end divides is one.
        """
        words: list[int] = []
        rows: list[int] = []
        for number, chunk in enumerate(self._chunks(prompt)):
            first = number * self._encoder.context_length + 1
            words += chunk[1:-1]
            rows += range(first, first + len(chunk) - 2)
        return words, rows

    def _features(self, prompts: Sequence[str]) -> dict[str, TextFeatures]:
        """Of each prompt: context (n, d) of its chunks, pooled (w,) of the first."""
        chunks = [self._chunks(prompt) for prompt in prompts]
        token_ids = [ids for own in chunks for ids in own]
        ids = self._encoder.pad(token_ids)
        if torch.is_grad_enabled() and self._cut in ("start and padding", "own words"):
            context, pooled = self._passing_before(max(map(len, token_ids)), ids)
        else:
            context, pooled = self._encoder.encode_with_pooled(ids)
        counts = [len(own) for own in chunks]
        contexts = [own.flatten(0, 1) for own in context.split(counts)]
        rows = [None] * len(prompts) if pooled is None else [p[0] for p in pooled.split(counts)]
        return dict(zip(prompts, map(TextFeatures, contexts, rows), strict=True))

    def _passing_before(self, length: int, ids: Tensor) -> TextFeatures:
        """Features that pass gradients on before the padding alone, which is most of a prompt.

        None come back from padding, and what stands before it does not see it.
        """
        with torch.no_grad():
            context, pooled = self._encoder.encode_with_pooled(ids)
        words, pooled_words = self._encoder.encode_with_pooled(ids[..., :length])
        context[:, :length] = _passing(context[:, :length], words)
        if pooled is not None and pooled_words is not None:
            pooled = _passing(pooled, pooled_words)
        return TextFeatures(context, pooled)

    def _passing_rows(self, prompts: Sequence[str], context: Tensor) -> Tensor | None:
        if self._cut == "none":
            return None
        passing = []
        for prompt in prompts:
            chunks = self._chunks(prompt)
            rows = torch.ones(len(chunks), self._encoder.context_length)
            rows[:, 0] = 0
            if self._cut in ("start and padding", "own words"):
                for row, ids in zip(rows, chunks, strict=True):
                    row[len(ids) :] = 0
            passing.append(rows.flatten())
        # Once: each row by itself would be sent alone.
        return _side_by_side(passing).to(context.device)


def lengthened(rows: Tensor, length: int, dim: int = 1) -> Tensor:
    """Rows along `dim` repeated until there are so many: attention does not notice it."""
    times = [1] * rows.ndim
    times[dim] = length // rows.shape[dim]
    return rows if times[dim] == 1 else rows.repeat(times)


def _side_by_side(each: Sequence[Tensor]) -> Tensor:
    """(b, n, ...) of the rows (n_i, ...) of prompts of so many chunks."""
    longest = math.lcm(*map(len, each))
    return torch.stack([lengthened(rows, longest, 0) for rows in each])


def _leaf(features: Tensor) -> Tensor:
    return features.detach().requires_grad_(features.requires_grad)


def _passing(numbers: Tensor, to: Tensor) -> Tensor:
    """The same numbers to the bit; their gradients go to `to`, which differs by rounding."""
    return numbers + (to - to.detach())
