"""Text features: the contract a text encoder fulfils, and encoding many prompts without padding."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class TextFeatures(NamedTuple):
    """All that a UNet reads of texts."""

    context: Tensor
    """(b, n, d), for cross-attention"""
    pooled: Tensor | None = None
    """(b, w), each text as one row; None where the model reads none"""


class TextEncoder(Protocol):
    """Turns prompts into the features that cross-attention reads.

    The encoder is causal: the features of a word do not depend on what follows it.
    """

    context_width: int
    context_length: int
    """Positions of a padded prompt, 77 for CLIP."""

    def tokenize(self, prompt: str) -> list[int]:
        """Start token, words, end token; unpadded; at most `context_length`."""
        ...

    def tokenize_words(self, text: str) -> list[int]:
        """The words alone, without start and end tokens."""
        ...

    def pad(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Ids (b, context_length), padded as the model was trained.

        Of two encoders that pad in different ways (b, 2, context_length).
        """
        ...

    def encode(self, token_ids: Tensor) -> Tensor:
        """Ids as they are, (b, n), or as `pad` returns them → features (b, n, context_width),
        float32.
        """
        ...

    def encode_with_pooled(self, token_ids: Tensor) -> TextFeatures:
        """The same, and the pooled feature of models that read one (`Family.pooled_width`)."""
        ...

    def with_tokens(self, embeddings: Mapping[str, Mapping[str, Tensor]]) -> "TextEncoder":
        """The same encoder, knowing more words (encoder name → token → (vectors, width)).

        Tensors that require a gradient receive it from `encode`.
        """
        ...

    def piece_id(self, piece: str) -> int:
        """The id of a piece of the vocabulary; a piece that ends a word is written `cat</w>`."""
        ...

    def vocabulary_row(self, token_id: int) -> dict[str, Tensor]:
        """The embedding of a known word: encoder name → (1, width), a copy in float32."""
        ...

    def fingerprint(self) -> str:
        """Identifies weights and settings; equal fingerprints give equal features."""
        ...


MARK_PROMPT = "photo of a cat"
_MARK_NUMBERS = 32


@torch.no_grad()
def text_mark(encoder: TextEncoder) -> list[float]:
    """A few numbers by which a text encoder, and the layer of it that is read (clip skip), is known
    again: of what it makes of the end of `MARK_PROMPT`. Close in whatever precision it computes.
    """
    ids = encoder.tokenize(MARK_PROMPT)
    (features,) = encoder.encode(encoder.pad([ids]))
    return mark_of(features[len(ids) - 1])


def mark_of(features: Tensor) -> list[float]:
    """The mark, from the feature (d,) of the end of the prompt."""
    some = features[:: max(1, len(features) // _MARK_NUMBERS)][:_MARK_NUMBERS]
    return [float(f"{number:.4g}") for number in some.tolist()]


@torch.no_grad()
def encode_unpadded(
    encoder: TextEncoder,
    token_ids: Sequence[Sequence[int]],
    batch_size: int = 32,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> list[Tensor]:
    """Features (n_i, context_width) of each prompt, computed in batches of equal length.

    Exact for a causal encoder, and several times cheaper than padding every prompt.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(token_ids):
        by_length[len(ids)].append(index)
    features: dict[int, Tensor] = {}
    for indices in by_length.values():
        for start in range(0, len(indices), batch_size):
            chunk = indices[start : start + batch_size]
            encoded = encoder.encode(torch.tensor([list(token_ids[i]) for i in chunk]))
            features.update(zip(chunk, encoded, strict=True))
            on_progress(len(features) / len(token_ids))
    return [features[index] for index in range(len(token_ids))]
