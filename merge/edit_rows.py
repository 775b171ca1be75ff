"""What an edit constrains: the rows of a word, and what each of them is to become.

All targets are mixtures of text features, so they are the same for every layer: a row c is to be
mapped as c + Δ is now, W (c) = W₀ (c + Δ), and the layer's matrix stands before everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..concept.errors import MergeError
from ..concept.prompts import CONSTRAINT_TEMPLATES
from ..concept.text import TextEncoder, encode_unpadded
from .edits import Edit
from .rows import group_rows


@dataclass(frozen=True)
class EditRows:
    """Rows in one order: of each edit, then those that stay."""

    features: Tensor
    """C (s, d), float64"""
    moves: Tensor
    """Δ (s, d), zero where a row stays"""
    edits: Tensor
    """(s,) which edit a row belongs to; -1 where it stays"""

    @property
    def still(self) -> Tensor:
        return self.edits < 0


def edit_rows(edits: Sequence[Edit], preserved: Sequence[str], encoder: TextEncoder) -> EditRows:
    """The last piece of every word and the end of text, in each template.

    Nothing is constrained before the last piece: the text encoder is causal, so what stands before
    it means the same in other words too. The start of text and the empty prompt stay, because
    guidance leans on them.

    Raises MergeError for words of no letters, and where an edited row must stay at once.
    """
    both = sorted({edit.word for edit in edits} & set(preserved))
    if both:
        raise MergeError(f"'{both[0]}' is edited and preserved at once. Leave one of the two out.")
    features, moves, owners = [], [], []
    for index, edit in enumerate(edits):
        for template in CONSTRAINT_TEMPLATES:
            rows = _last_rows(template.format(edit.word), edit.word, encoder)
            features.append(rows)
            moves.append(edit.share * _move(edit, template, rows, encoder))
            owners += [index] * len(rows)
    (start_and_end,) = encode_unpadded(encoder, [encoder.tokenize("")])
    padding = encoder.encode(encoder.pad([encoder.tokenize("")]))[0, -1:]
    still = [start_and_end.double().cpu(), padding.double().cpu()]
    for word in preserved:
        still += [_last_rows(t.format(word), word, encoder) for t in CONSTRAINT_TEMPLATES]
    staying = torch.cat(still)
    all_features = torch.cat([*features, staying])
    if not all_features.isfinite().all():
        raise MergeError("The text features are not finite numbers. Load the CLIP again.")
    return _without_twins(
        all_features,
        torch.cat([*moves, torch.zeros_like(staying)]),
        torch.tensor(owners + [-1] * len(staying)),
        edits,
    )


def _without_twins(
    features: Tensor, moves: Tensor, owners: Tensor, edits: Sequence[Edit]
) -> EditRows:
    """Rows that coincide as one, at the mean of what they ask for."""
    groups = group_rows(features)
    for group in groups:
        own = owners[group]
        if own.max() >= 0 and (own.min() < 0 or len(own.unique()) > 1):
            word = edits[int(own.max())].word
            other = "a preserved word" if own.min() < 0 else f"'{edits[int(own.min())].word}'"
            raise MergeError(
                f"'{word}' and {other} are the same to the text encoder, so they cannot be treated "
                "differently. Leave one of them out."
            )
    return EditRows(
        torch.stack([features[group].mean(0) for group in groups]),
        torch.stack([moves[group].mean(0) for group in groups]),
        torch.stack([owners[group[0]] for group in groups]),
    )


def _move(edit: Edit, template: str, rows: Tensor, encoder: TextEncoder) -> Tensor:
    """Δ of the rows at a share of 1, (2, d)."""
    if edit.attributes:
        parts = (
            amount * _last_rows(template.format(name), name, encoder)
            for name, amount in edit.attributes
        )
        return torch.stack(list(parts)).sum(0)
    return _target(edit, template, encoder) - rows


def _target(edit: Edit, template: str, encoder: TextEncoder) -> Tensor:
    """What the rows become at a share of 1, (2, d)."""
    if edit.into:
        return _last_rows(template.format(edit.into), edit.into, encoder)
    without = template.format("").strip()
    (rows,) = encode_unpadded(encoder, [encoder.tokenize(without)])
    # The word becomes the start of text, which says nothing and is attended to where nothing is
    # meant (UCE); the end of text that of the prompt without the word.
    return rows[[0, -1]].double().cpu()


def _last_rows(prompt: str, word: str, encoder: TextEncoder) -> Tensor:
    """Features of a prompt's last word's last piece and of the end of text, (2, d)."""
    ids = encoder.tokenize(prompt)
    pieces = encoder.tokenize_words(word)
    if not pieces:
        raise MergeError(f"The text encoder reads no word in '{word}'. Give an ordinary word.")
    if ids[-1 - len(pieces) : -1] != pieces:
        raise MergeError(
            f"'{word[:60]}' has {len(pieces)} pieces, more than the text encoder reads in a "
            "prompt. Give a shorter one."
        )
    (rows,) = encode_unpadded(encoder, [ids])
    return rows[-2:].double().cpu()


def split_words(words: Sequence[str], encoder: TextEncoder) -> list[tuple[str, int]]:
    """Those that the tokenizer reads as more pieces than they have words, and how many."""
    counted = ((word, len(encoder.tokenize_words(word))) for word in words)
    return [(word, count) for word, count in counted if count > len(word.split())]
