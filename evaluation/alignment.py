"""How well pictures follow their prompts and look like a concept: CLIP-T, CLIP-I and, for crops of
several subjects, presence, resemblance and bleed.

All features have length 1, so that products are cosines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CLIP_SCORE_WEIGHT = 2.5
"""Hessel et al. 2021, CLIPScore (w = 2.5), which the paper's tables are in"""


def text_alignment(pictures: Tensor, texts: Tensor) -> Tensor:
    """CLIP-T of each picture (b, d) and its own text (b, d), (b,) in 0..2.5: CLIPScore,
    2.5 max(cos, 0). The trigger word must not be in the text.
    """
    return CLIP_SCORE_WEIGHT * (pictures * texts).sum(-1).clamp(min=0)


def image_alignment(pictures: Tensor, references: Tensor) -> Tensor:
    """CLIP-I of each picture (b, d), (b,) in -1..1: the mean of its cosines to all references (r,
    d). The mean over pictures is the paper's mean of all pairs.
    """
    return pictures @ references.mean(0)


def self_alignment(references: Tensor) -> Tensor:
    """Of each reference (r, d) to the others, (r,); NaN of a single one, which has no others."""
    count = len(references)
    sums = references @ references.sum(0) - references.square().sum(-1)
    return sums / (count - 1) if count > 1 else torch.full((count,), torch.nan)


@dataclass(frozen=True)
class CropScores:
    """Of pictures with several concepts, one crop a concept. The names and the sums are ours, in
    the spirit of Gen4Gen's CP-CLIP and of DSH-Bench, whose definitions are not public.
    """

    presence: Tensor
    """(concepts,): share of pictures in which the crop is nearer to its own concept than to all
    others; NaN of a concept without crops, here and below"""
    resemblance: Tensor
    """(concepts,): mean image alignment of a concept's crops to its own references"""
    bleed: Tensor
    """(concepts, concepts): mean image alignment of the crops of a row's concept to the references
    of a column's, less what those references have to one another anyway; 0 in the diagonal"""


def crop_scores(crops: Sequence[Tensor], references: Sequence[Tensor]) -> CropScores:
    """`crops` has for each concept the features (b, d) of its crops, as many as there are;
    `references` those (r, d) of its own pictures.
    """
    to_each = [
        torch.stack([image_alignment(crop, one) for one in references], -1) for crop in crops
    ]  # of each concept (its crops, concepts)
    presence = [(one.argmax(-1) == own).float().mean() for own, one in enumerate(to_each)]
    means = torch.stack([one.mean(0) for one in to_each])
    apart = torch.stack(
        [torch.stack([image_alignment(a, b).mean() for b in references]) for a in references]
    )
    bleed = (means - apart).fill_diagonal_(0)
    return CropScores(torch.stack(presence), means.diagonal().clone(), bleed)
