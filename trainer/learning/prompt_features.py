"""Text features of a step's prompts, and where their keys and values may learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ...concept.text import TextEncoder, TextFeatures
from ..config import GradientCut


class PromptFeatures:
    """Features of prompts: with a new token at every step, without one once."""

    def __init__(
        self, encoder: TextEncoder, words: Mapping[str, Iterable[str]], cut: GradientCut
    ) -> None:
        self._encoder, self._cut = encoder, cut
        self._tokens = {token for tokens in words.values() for token in tokens}
        self._fixed: dict[str, TextFeatures] = {}

    def encode(self, prompts: Sequence[str]) -> tuple[TextFeatures, Tensor | None]:
        """Features and where the keys and values of their context may pass gradients (b, n)."""
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
        return both, self._keep(prompts, context)

    def _features(self, prompts: Sequence[str]) -> dict[str, TextFeatures]:
        """Of each prompt: context (n, d), pooled (w,)."""
        token_ids = [self._encoder.tokenize(prompt) for prompt in prompts]
        ids = self._encoder.pad(token_ids)
        if torch.is_grad_enabled() and self._cut == "start and padding":
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

    def _keep(self, prompts: Sequence[str], context: Tensor) -> Tensor | None:
        if self._cut == "none":
            return None
        keep = torch.ones(context.shape[:2], device=context.device)
        keep[:, 0] = 0
        if self._cut == "start and padding":
            for row, prompt in zip(keep, prompts, strict=True):
                row[len(self._encoder.tokenize(prompt)) :] = 0
        return keep


def _passing(numbers: Tensor, to: Tensor) -> Tensor:
    """The same numbers to the bit; their gradients go to `to`, which differs by rounding."""
    return numbers + (to - to.detach())
