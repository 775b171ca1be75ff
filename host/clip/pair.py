"""The two text encoders of Stable Diffusion XL, as one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...concept.errors import TokenError
from ...concept.text import TextFeatures
from .text_encoder import ClipTextEncoder


class ClipTextEncoderPair:
    """Two encoders that read the same words; fulfils `concept.text.TextEncoder`.

    Their features stand side by side; the pooled one is the second's. Their vocabularies are the
    same, and so are the ids of new words, but each pads in its own way.
    """

    def __init__(self, first: ClipTextEncoder, second: ClipTextEncoder) -> None:
        if first.tokens != second.tokens:
            raise TokenError(
                f"The new words of the text encoders {first.name} and {second.name} differ: "
                f"{_described(first)} and {_described(second)}. Each needs the same words with "
                f"the same number of vectors: take another copy of the concept, or train it again."
            )
        self._encoders = first, second
        self.context_width = first.context_width + second.context_width
        self.context_length = min(first.context_length, second.context_length)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Both; see `ClipTextEncoder.to`."""
        for encoder in self._encoders:
            encoder.to(device, dtype)

    @property
    def tokens(self) -> dict[str, int]:
        """The new words that both know, in order, with how many vectors each has."""
        return self._encoders[0].tokens

    def tokenize(self, prompt: str) -> list[int]:
        return self._encoders[0].tokenize(prompt)

    def tokenize_words(self, text: str) -> list[int]:
        return self._encoders[0].tokenize_words(text)

    def pad(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        return torch.stack([encoder.pad(token_ids) for encoder in self._encoders], dim=1)

    def encode(self, token_ids: Tensor) -> Tensor:
        return self.encode_with_pooled(token_ids).context

    def encode_with_pooled(self, token_ids: Tensor) -> TextFeatures:
        """Ids (b, n), the same for both, or (b, 2, n)."""
        each = token_ids.unbind(1) if token_ids.ndim == 3 else (token_ids, token_ids)
        first, second = (
            encoder.encode_with_pooled(ids)
            for encoder, ids in zip(self._encoders, each, strict=True)
        )
        return TextFeatures(torch.cat([first.context, second.context], -1), second.pooled)

    def with_tokens(self, embeddings: Mapping[str, Mapping[str, Tensor]]) -> ClipTextEncoderPair:
        first, second = (encoder.with_tokens(embeddings) for encoder in self._encoders)
        return ClipTextEncoderPair(first, second)

    def piece_id(self, piece: str) -> int:
        return self._encoders[0].piece_id(piece)

    def vocabulary_row(self, token_id: int) -> dict[str, Tensor]:
        first, second = (encoder.vocabulary_row(token_id) for encoder in self._encoders)
        return {**first, **second}

    def fingerprint(self) -> str:
        both = " ".join(encoder.fingerprint() for encoder in self._encoders)
        return hashlib.blake2b(both.encode(), digest_size=16).hexdigest()


def _described(encoder: ClipTextEncoder) -> str:
    words = [f"{token} of {count}" for token, count in encoder.tokens.items()]
    return ", ".join(words) or "none"
