"""Text features of a step's prompts, and where their keys and values may learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..concept.text import TextEncoder
from .config import GradientCut


class PromptFeatures:
    """Features of prompts: with a new token at every step, without one once."""

    def __init__(
        self, encoder: TextEncoder, words: Mapping[str, Iterable[str]], cut: GradientCut
    ) -> None:
        self._encoder, self._cut = encoder, cut
        self._tokens = {token for tokens in words.values() for token in tokens}
        self._fixed: dict[str, Tensor] = {}

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Features (b, n, d) and where their keys and values may pass gradients (b, n)."""
        unique = list(dict.fromkeys(prompts))
        learnt = [p for p in unique if any(token in p for token in self._tokens)]
        missing = [p for p in unique if p not in learnt and p not in self._fixed]
        if missing:
            with torch.no_grad():
                self._fixed.update(self._features(missing))
        features = {**self._fixed, **(self._features(learnt) if learnt else {})}
        context = torch.stack([features[prompt] for prompt in prompts])
        return context, self._keep(prompts, context)

    def _features(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        ids = self._encoder.pad([self._encoder.tokenize(prompt) for prompt in prompts])
        return dict(zip(prompts, self._encoder.encode(ids), strict=True))

    def _keep(self, prompts: Sequence[str], context: Tensor) -> Tensor | None:
        if self._cut == "none":
            return None
        keep = torch.ones(context.shape[:2], device=context.device)
        keep[:, 0] = 0
        if self._cut == "start and padding":
            for row, prompt in zip(keep, prompts, strict=True):
                row[len(self._encoder.tokenize(prompt)) :] = 0
        return keep
