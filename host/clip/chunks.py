"""Prompts of any length and with weights, as ComfyUI reads them: in chunks of what CLIP takes at
once, whose features stand one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from ...concept.prompts import split_at_tokens
from ...concept.text import TextFeatures
from ...concept.weighted_prompts import weighted_parts
from .pair import ClipTextEncoderPair
from .text_encoder import ClipTextEncoder

Encoder = ClipTextEncoder | ClipTextEncoderPair
Chunk = list[tuple[int, float]]
"""Tokens with their weights, without start and end"""
_LONG = 8
"""As many tokens or more at a chunk's end are divided; fewer go on together into the next"""


def chunks_of(prompt: str, encoder: Encoder) -> list[Chunk]:
    """At least one; each fits into the encoder's positions beside start and end."""
    room = encoder.context_length - 2
    chunks: list[Chunk] = [[]]
    for group in _groups(prompt, encoder):
        together = len(group) < min(_LONG, room)
        while len(group) > room - len(chunks[-1]):
            if not together:
                space = room - len(chunks[-1])
                chunks[-1] += group[:space]
                group = group[space:]
            chunks.append([])
        chunks[-1] += group
    return chunks


def words_of(prompt: str, encoder: Encoder) -> tuple[list[int], list[int]]:
    """A prompt's tokens chunk after chunk, without starts and ends, and the rows of its features at
    which they stand. A phrase that a chunk's end divides is one.
    """
    tokens: list[int] = []
    rows: list[int] = []
    for number, chunk in enumerate(chunks_of(prompt, encoder)):
        first = number * encoder.context_length + 1
        tokens += [token for token, _ in chunk]
        rows += range(first, first + len(chunk))
    return tokens, rows


def encode_prompts(encoder: Encoder, prompts: Sequence[str]) -> TextFeatures:
    """Context (b, n, d): n is a multiple of the encoder's positions, the same for all. Those of
    fewer chunks are repeated, which attention does not notice. The pooled feature is that of the
    first chunk.
    """
    chunks = [chunks_of(prompt, encoder) for prompt in prompts]
    features, pooled = _encode(encoder, list(chain.from_iterable(chunks)))
    each = features.split([len(own) for own in chunks])
    most = math.lcm(*(len(own) for own in chunks))
    context = torch.stack([own.flatten(0, 1).repeat(most // len(own), 1) for own in each])
    if pooled is None:
        return TextFeatures(context)
    firsts = [own[0] for own in pooled.split([len(own) for own in chunks])]
    return TextFeatures(context, torch.stack(firsts))


def as_long_as(longer: Tensor, context: Tensor) -> Tensor:
    """A context (b, n, d) of as many positions as a longer one, repeated."""
    return context.repeat(1, longer.shape[1] // context.shape[1], 1)


def _encode(encoder: Encoder, chunks: Sequence[Chunk]) -> TextFeatures:
    """Features (chunks, positions, d): each token's are as far from the empty prompt's, at its
    place, as it weighs.
    """
    start, end = encoder.tokenize("")
    ids = encoder.pad([[start, *(token for token, _ in chunk), end] for chunk in chunks])
    context, pooled = encoder.encode_with_pooled(ids)
    if all(weight == 1 for chunk in chunks for _, weight in chunk):
        return TextFeatures(context, pooled)
    weights = torch.ones(context.shape[:2])
    for row, chunk in zip(weights, chunks, strict=True):
        row[1 : len(chunk) + 1] = torch.tensor([weight for _, weight in chunk])
    (empty,) = encoder.encode(encoder.pad([[start, end]]))
    return TextFeatures(_weighted(context, empty, weights.to(context)), pooled)


def _weighted(context: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    moved = empty + (context - empty) * weights[..., None]
    return torch.where(weights[..., None] == 1, context, moved)


def _groups(prompt: str, encoder: Encoder) -> Iterator[Chunk]:
    """What a chunk's end treats as one: a stretch of one weight, a word of several vectors."""
    long_words = [word for word, vectors in encoder.tokens.items() if vectors > 1]
    for text, weight in weighted_parts(prompt):
        for stretch in split_at_tokens(text, long_words):
            yield [(token, weight) for token in encoder.tokenize_words(stretch)]
