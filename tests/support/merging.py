"""Concepts to merge with a small causal text encoder, and the features a merge should gather."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.delta import LowRankDelta
from custom_diffusion.merge.captions import regularization_captions
from custom_diffusion.merge.merging import merge_concepts
from custom_diffusion.merge.report import MergeReport
from torch import Tensor

from .concepts import LAYERS, random_concept
from .text import RecurrentTextEncoder

WIDTH = 64
RIDGE = 1e-4
CAPTIONS = regularization_captions(60, seed=1)

CAT = random_concept("<new1>", "cat", seed=1)
DOG = random_concept("<new2>", "dog", seed=2)
VASE = random_concept("<new3>", "vase", seed=3)


def merge(
    concepts: Sequence[Concept],
    strengths: Sequence[float] | None = None,
    encoder: RecurrentTextEncoder | None = None,
    captions: Sequence[str] = CAPTIONS,
    cache: Path | None = None,
) -> tuple[Concept, MergeReport]:
    return merge_concepts(
        concepts,
        encoder or RecurrentTextEncoder(WIDTH),
        strengths=strengths,
        captions=captions,
        relative_ridge=RIDGE,
        cache_folder=cache,
    )


def knowing(concepts: Sequence[Concept]) -> RecurrentTextEncoder:
    """The encoder that knows the modifier tokens of all the concepts."""
    embeddings: dict[str, dict[str, Tensor]] = {"clip_l": {}}
    for concept in concepts:
        for token in concept.tokens:
            embeddings["clip_l"][token.name] = token.embeddings["clip_l"]
    return RecurrentTextEncoder(WIDTH).with_tokens(embeddings)


def prompts_of(concept: Concept) -> tuple[str, str]:
    (token,) = concept.tokens
    subject = f"{token.name} {token.class_noun}"
    return subject, f"photo of a {subject}"


def constrained_features(concept: Concept, encoder: RecurrentTextEncoder) -> Tensor:
    """Modifier token to end of text of both prompts, each padded and encoded alone; float64."""
    (token,) = concept.tokens
    rows = []
    for prompt in prompts_of(concept):
        ids = encoder.tokenize(prompt)
        start = ids.index(encoder.tokenize_words(token.name)[0])
        rows.append(encoder.encode(encoder.pad([ids]))[0, start : len(ids)])
    return torch.cat(rows).double()


def caption_rows(captions: Sequence[str] = CAPTIONS) -> Tensor:
    """C_reg, with the ridge as further rows of its own; float64."""
    encoder = RecurrentTextEncoder(WIDTH)
    words = [encoder.encode(torch.tensor([encoder.tokenize(c)]))[0, 1:] for c in captions]
    features = torch.cat(words).double()
    ridge = RIDGE * features.square().sum() / WIDTH
    return torch.cat([features, ridge.sqrt() * torch.eye(WIDTH, dtype=torch.float64)])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def change_of(concept: Concept, layer: str) -> Tensor:
    if layer not in concept.deltas:
        return torch.zeros(LAYERS[layer], WIDTH, dtype=torch.float64)
    delta = concept.deltas[layer]
    if isinstance(delta, LowRankDelta):
        return delta.up.double() @ delta.down.double()
    return delta.dense().double()
