"""Constraint rows: the words that concepts must keep, their features, and which coincide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..concept.concept import Concept
from ..concept.errors import MergeError
from ..concept.prompts import (
    CONSTRAINT_TEMPLATES,
    constrained_positions,
    own_positions,
    subject,
)
from ..concept.text import TextEncoder, encode_unpadded

SAME_ROW_DISTANCE = 1e-3
"""Rows closer than this, relative to their length, are one row."""
SAME_CHANGE = 1e-3
"""Concepts whose words are missed by less than this share ask for the same there; rows that differ
by no more than SAME_ROW_DISTANCE make up to so much."""


@dataclass(frozen=True)
class ConstraintRow:
    """One word that a concept's own model must keep mapping as it does."""

    concept: int
    prompt: str
    position: int
    still: bool = False
    """A word of the bare class noun, which must stay as the base model has it."""


def concept_prompts(concept: Concept) -> tuple[str, ...]:
    """The prompts whose features the merge keeps for this concept."""
    return concept.constraint_prompts or tuple(
        template.format(subject(token.name, token.class_noun))
        for token in concept.tokens
        for template in CONSTRAINT_TEMPLATES
    )


def constraint_features(
    concepts: Sequence[Concept], encoder: TextEncoder
) -> tuple[list[ConstraintRow], Tensor]:
    """Constraint rows and their features C (s, d): V*, class noun and end of each prompt; of a
    concept that means nothing at other words, V* and class noun, and the bare class noun as a row
    that stays: `cat` lies near `<new1> cat`, and no regularization picture held it in training.
    """
    prompts = [
        (index, prompt)
        for index, concept in enumerate(concepts)
        for prompt in concept_prompts(concept)
    ]
    token_ids = [encoder.tokenize(prompt) for _, prompt in prompts]
    encoded = encode_unpadded(encoder, token_ids)
    rows, features = [], []
    for (index, prompt), ids, prompt_features in zip(prompts, token_ids, encoded, strict=True):
        for position in _positions(concepts[index], prompt, ids, encoder):
            rows.append(ConstraintRow(index, prompt, position))
            features.append(prompt_features[position])
    for row, row_features in _bare_nouns(concepts, encoder):
        rows.append(row)
        features.append(row_features)
    stacked = torch.stack(features).to(torch.float64).cpu()
    for row, finite in zip(rows, stacked.isfinite().all(1), strict=True):
        if not finite:
            raise MergeError(
                f"The text features of {row.prompt!r} are not finite numbers: the embedding of its "
                "trigger word is broken. Train that concept again."
            )
    return rows, stacked


def _positions(
    concept: Concept, prompt: str, token_ids: Sequence[int], encoder: TextEncoder
) -> Sequence[int]:
    words = encoder.tokenize_words
    names = [token.name for token in concept.tokens if token.name in prompt]
    # A concept without a token: its class noun is the last word of the prompt.
    noun = (prompt.split() or [""])[-1]
    try:
        if concept.scope == "every word":
            word = min(names, key=prompt.index, default=noun)
            return constrained_positions(token_ids, words(word))
        nouns = {token.name: token.class_noun for token in concept.tokens}
        own = [own_positions(token_ids, words(name), words(nouns[name])) for name in names]
        positions = sorted(
            {i for found in own or [own_positions(token_ids, [], words(noun))] for i in found}
        )
        if not positions:
            raise ValueError("the prompt does not contain its subject")
        return positions
    except ValueError as error:
        raise MergeError(
            f"The prompt {prompt[:60]!r} of the concept {concept.describe()} does not hold the "
            f"concept's words within the {encoder.context_length} positions of the text encoder. "
            "Train the concept again with shorter prompts."
        ) from error


def _bare_nouns(
    concepts: Sequence[Concept], encoder: TextEncoder
) -> Iterator[tuple[ConstraintRow, Tensor]]:
    """The class nouns of concepts that live in their own words, in their prompts without V*."""
    for index, concept in enumerate(concepts):
        for token in concept.tokens if concept.scope == "own words" else ():
            noun = encoder.tokenize_words(token.class_noun) if token.class_noun else []
            for prompt in concept_prompts(concept) if noun else ():
                if token.name not in prompt:
                    continue
                bare = " ".join(prompt.replace(token.name, " ").split())
                ids = encoder.tokenize(bare)
                (features,) = encode_unpadded(encoder, [ids])
                for position in own_positions(ids, [], noun):
                    yield ConstraintRow(index, bare, position, still=True), features[position]


def group_rows(features: Tensor) -> list[list[int]]:
    """Indices of rows that are the same within SAME_ROW_DISTANCE, whatever their order."""
    norms = features.norm(dim=1)
    near = torch.cdist(features, features) < SAME_ROW_DISTANCE * torch.maximum(
        norms[:, None], norms[None, :]
    )
    near |= torch.eye(len(features), dtype=torch.bool)
    while not torch.equal(wider := (near.double() @ near.double()) > 0, near):  # transitive closure
        near = wider
    return [
        list(group) for group in dict.fromkeys(tuple(row.nonzero()[:, 0].tolist()) for row in near)
    ]


def shared_rows(
    rows: Sequence[ConstraintRow],
    features: Tensor,
    groups: Sequence[Sequence[int]],
    strengths: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """One feature row a group (s, d), and the mixing (rows, s) of what its members ask for.

    Members share a row by the mean of what they ask for, weighted by their concepts' strengths; a
    row that is to stay asks for nothing, and gives way to one that is taught.
    """
    mixing = torch.zeros(len(rows), len(groups), dtype=torch.float64)
    for column, group in enumerate(groups):
        weights = torch.tensor(
            [0 if rows[i].still else abs(strengths[rows[i].concept]) for i in group],
            dtype=torch.float64,
        )
        share = weights / weights.sum() if weights.sum() > 0 else torch.zeros_like(weights)
        for i, part in zip(group, share, strict=True):
            mixing[i, column] = part * strengths[rows[i].concept]
    return torch.stack([features[group].mean(0) for group in groups]), mixing


def conflicts(
    rows: Sequence[ConstraintRow], groups: Sequence[Sequence[int]], residuals: Sequence[float]
) -> Iterator[str]:
    """Of words that several concepts share. Where each gets what it asks for all the same, by the
    largest error on its own words, they ask for one thing: there is nothing to tell.
    """
    involved = {
        frozenset((rows[i].concept, rows[i].prompt) for i in group if not rows[i].still)
        for group in groups
    }
    for members in sorted(involved, key=sorted):
        sharing = {concept for concept, _ in members}
        if len(sharing) > 1 and max(residuals[concept] for concept in sharing) > SAME_CHANGE:
            where = " and ".join(f"concept {c + 1} in '{prompt}'" for c, prompt in sorted(members))
            yield (
                f"the same words mean different things to {where}; their mean was used. "
                f"Give each concept its own trigger word."
            )
