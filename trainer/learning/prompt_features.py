"""Text features of a step's prompts, and where their keys and values may learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...concept.prompts import own_positions
from ...concept.text import TextEncoder, TextFeatures
from ..config import GradientCut


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

    def encode(self, prompts: Sequence[str]) -> PromptText:
        """Features, and which of their rows learn."""
        unique = list(dict.fromkeys(prompts))
        learnt = [p for p in unique if any(token in p for token in self._tokens)]
        missing = [p for p in unique if p not in learnt and p not in self._fixed]
        with torch.no_grad():
            for prompt in missing:  # one by one: its numbers must not depend on its neighbours
                self._fixed.update(self._features([prompt]))
        features = {**self._fixed, **(self._features(learnt) if learnt else {})}
        context = torch.stack([features[prompt].context for prompt in prompts])
        pooled = [row for prompt in prompts if (row := features[prompt].pooled) is not None]
        both = TextFeatures(context, torch.stack(pooled) if pooled else None)
        return PromptText(both, self._passing_rows(prompts, context), self._own(prompts, context))

    def _own(self, prompts: Sequence[str], context: Tensor) -> Tensor | None:
        if self._cut != "own words":
            return None
        words = self._encoder.tokenize_words
        own = torch.zeros(context.shape[:2])
        for row, prompt in zip(own, prompts, strict=True):
            ids = self._encoder.tokenize(prompt)
            for token, noun in self._subjects:
                found = own_positions(ids, words(token) if token else [], words(noun))
                row[found] = 1
        return own

    def word_rows(self, prompts: Sequence[str], context: Tensor) -> Tensor:
        """Where each concept's trigger word, and then its class noun, stand in each prompt: one
        there, else zero (b, 2 · concepts, n).
        """
        words = self._encoder.tokenize_words
        rows = torch.zeros(len(prompts), 2 * len(self._subjects), context.shape[1])
        for of_prompt, prompt in zip(rows, prompts, strict=True):
            ids = self._encoder.tokenize(prompt)
            for place, (token, noun) in enumerate(self._subjects):
                trigger = own_positions(ids, words(token), []) if token else []
                own = own_positions(ids, words(token) if token else [], words(noun))
                of_prompt[2 * place, trigger] = 1
                of_prompt[2 * place + 1, [n for n in own if n not in trigger]] = 1
        return rows.to(context.device)

    def _features(self, prompts: Sequence[str]) -> dict[str, TextFeatures]:
        """Of each prompt: context (n, d), pooled (w,)."""
        token_ids = [self._encoder.tokenize(prompt) for prompt in prompts]
        ids = self._encoder.pad(token_ids)
        if torch.is_grad_enabled() and self._cut in ("start and padding", "own words"):
            context, pooled = self._passing_before(max(map(len, token_ids)), ids)
        else:
            context, pooled = self._encoder.encode_with_pooled(ids)
        rows = [None] * len(prompts) if pooled is None else list(pooled)
        return dict(zip(prompts, map(TextFeatures, context, rows), strict=True))

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
        passing = torch.ones(context.shape[:2])
        passing[:, 0] = 0
        if self._cut in ("start and padding", "own words"):
            for row, prompt in zip(passing, prompts, strict=True):
                row[len(self._encoder.tokenize(prompt)) :] = 0
        return passing.to(context.device)  # once: each row by itself would be sent alone


def _leaf(features: Tensor) -> Tensor:
    return features.detach().requires_grad_(features.requires_grad)


def _passing(numbers: Tensor, to: Tensor) -> Tensor:
    """The same numbers to the bit; their gradients go to `to`, which differs by rounding."""
    return numbers + (to - to.detach())
