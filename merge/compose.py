"""Merging concepts: features of the constrained words, the shared projector, and two thin products
a layer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..concept.atomic import write_atomically
from ..concept.concept import Concept, Delta, LowRankDelta
from ..concept.errors import IncompatibleModelError, MergeError
from ..concept.layers import sort_layers
from ..concept.prompts import CONSTRAINT_TEMPLATES, constrained_positions, subject
from ..concept.text import TextEncoder, encode_unpadded
from .captions import regularization_captions
from .projector import CaptionFactor, Projector, caption_factor, constraint_projector

DEFAULT_RELATIVE_RIDGE = 1e-4
_FACTOR_VERSION = "caption factor 1"  # raise it when the factor is computed in another way
SAME_ROW_DISTANCE = 1e-3
"""Constraint rows closer than this, relative to their length, are one row."""
LARGE_RESIDUAL = 0.1
"""A concept whose words are missed by more than this share deserves a warning."""
LARGE_CHANGE = 5.0
"""A merge that changes the model this many times more than its largest concept deserves a warning.
"""


@dataclass(frozen=True)
class ConstraintRow:
    """One word that a concept's own model must keep mapping as it does."""

    concept: int
    prompt: str
    position: int


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: for reading, and for deciding whether to trust it."""

    rows: tuple[ConstraintRow, ...]
    shared_rows: int
    """Constraint rows left after rows with equal features became one."""
    conflicts: tuple[str, ...]
    condition: float
    damped: bool
    residuals: tuple[float, ...]
    """Largest relative error on each concept's constrained words."""
    change: float
    """‖ΔW‖ of the merge over the largest ‖ΔW‖ of a single concept."""
    captions: int

    def lines(self) -> Iterator[str]:
        exact = "damped" if self.damped else "exact"
        yield (
            f"{len(self.rows)} constraint rows, {self.shared_rows} different; {exact} "
            f"(condition {self.condition:.3g}); {self.captions} regularization captions"
        )
        for index, residual in enumerate(self.residuals):
            yield f"concept {index + 1}: largest error on its own words {residual:.2%}"
        yield f"change of the model: {self.change:.2f} times its largest concept's"
        yield from (f"conflict: {conflict}" for conflict in self.conflicts)
        if max(self.residuals) > LARGE_RESIDUAL:
            yield (
                "warning: the concepts' words are too alike to keep each exactly. Give them other "
                "class nouns or modifier tokens, or train the concepts together."
            )
        if self.change > LARGE_CHANGE:
            yield (
                "warning: the concepts' words are hard to tell apart, so the merge changes the "
                "model a lot. Check pictures of the bare class nouns, or train the concepts "
                "together."
            )

    def text(self) -> str:
        return "\n".join(self.lines())


def merge_concepts(
    concepts: Sequence[Concept],
    encoder: TextEncoder,
    *,
    strengths: Sequence[float] | None = None,
    captions: Sequence[str] | None = None,
    relative_ridge: float = DEFAULT_RELATIVE_RIDGE,
    cache_folder: Path | None = None,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> tuple[Concept, MergeReport]:
    """Merges concepts by constrained least squares (Custom Diffusion, Eq. 4-5).

    The result is again a concept, exactly low rank, with every modifier token of its parents. The
    order of the concepts does not matter. `strengths` scale what each concept asks for (1 when not
    given); `captions` replace our own regularization captions; their factor is kept in
    `cache_folder`.

    Raises MergeError, IncompatibleModelError or TokenError; inputs are never changed.
    """
    strengths = [1.0] * len(concepts) if strengths is None else list(strengths)
    _check(concepts, encoder, strengths)
    captions = regularization_captions() if captions is None else list(captions)

    factor = cached_caption_factor(encoder, captions, relative_ridge, cache_folder)
    on_progress(0.5)

    tokens = tuple(token for concept in concepts for token in concept.tokens)
    whole = replace(
        concepts[0], tokens=tokens
    )  # raises TokenError where two concepts share a token
    rows, features = constraint_features(concepts, encoder.with_tokens(whole.embeddings()))
    groups = _group_rows(features)
    shared, mixing = _shared_rows(rows, features, groups, strengths)
    projector = constraint_projector(factor, shared)
    on_progress(0.7)

    deltas, residuals = merged_deltas(concepts, strengths, rows, features, mixing, projector)
    on_progress(1.0)

    merged = Concept(
        family=concepts[0].family,
        deltas=deltas,
        tokens=tokens,
        base_hash=next((c.base_hash for c in concepts if c.base_hash), ""),
        constraint_prompts=tuple(
            prompt for concept in concepts for prompt in concept_prompts(concept)
        ),
        provenance={
            "method": "constrained least squares merge",
            "strengths": strengths,
            "parents": [dict(concept.provenance) for concept in concepts],
        },
    )
    report = MergeReport(
        rows=tuple(rows),
        shared_rows=len(groups),
        conflicts=tuple(_conflicts(rows, groups)),
        condition=projector.condition,
        damped=projector.damped,
        residuals=tuple(residuals),
        change=_norm(merged) / max(max(_norm(concept) for concept in concepts), 1e-30),
        captions=factor.captions,
    )
    return merged, report


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
    """Constraint rows and their features C (s, d): V*, class noun and end of each prompt."""
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
    return rows, torch.stack(features).to(torch.float64).cpu()


def merged_deltas(
    concepts: Sequence[Concept],
    strengths: Sequence[float],
    rows: Sequence[ConstraintRow],
    features: Tensor,
    mixing: Tensor,
    projector: Projector,
) -> tuple[dict[str, Delta], list[float]]:
    """ΔW = E P of every layer as factors (E · left, rows), and each concept's largest residual.

    `mixing` (rows, s) gathers what the concepts ask for on equal rows. Nothing of size (o, d) is
    ever built. The residual of a row is ‖ΔW c − a D c‖ / ‖D c‖ over all layers, at strength a.
    """
    down = projector.rows.float()
    parts = []
    for index, concept in enumerate(concepts):
        own = [i for i, row in enumerate(rows) if row.concept == index]
        place = (mixing[own] @ projector.left).float()  # where the asked rows go in `up`
        parts.append(_Part(concept, strengths[index], features[own].float(), place))
    deltas: dict[str, Delta] = {}
    for layer in sort_layers({layer for concept in concepts for layer in concept.deltas}):
        asked = [
            (part, part.concept.deltas[layer].map_rows(part.features))
            for part in parts
            if layer in part.concept.deltas
        ]
        up = torch.stack([target.T @ part.place for part, target in asked]).sum(0)
        deltas[layer] = LowRankDelta(up, down)
        for part, target in asked:
            part.add_residual((part.features @ down.T) @ up.T, target)
    return deltas, [part.largest_residual() for part in parts]


class _Part:
    """One concept's share of a merge: its constraint rows, their place in the factors, and their
    errors.
    """

    def __init__(self, concept: Concept, strength: float, features: Tensor, place: Tensor) -> None:
        self.concept, self.features, self.place = concept, features, place
        self._strength = strength
        self._error, self._asked = torch.zeros(len(features)), torch.zeros(len(features))

    def add_residual(self, mapped: Tensor, target: Tensor) -> None:
        self._error += (mapped - self._strength * target).square().sum(1)
        self._asked += target.square().sum(1)

    def largest_residual(self) -> float:
        return float((self._error / self._asked).sqrt().nan_to_num(nan=0.0).max())


def cached_caption_factor(
    encoder: TextEncoder, captions: Sequence[str], relative_ridge: float, cache_folder: Path | None
) -> CaptionFactor:
    """The factor of the captions' features, from disk when the same encoder met the same captions
    before.
    """
    if cache_folder is None:
        return _compute_factor(encoder, captions, relative_ridge)
    text = "\n".join([_FACTOR_VERSION, encoder.fingerprint(), repr(relative_ridge), *captions])
    path = (
        cache_folder
        / f"captions-{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.safetensors"
    )
    if path.is_file():
        try:
            upper = load_file(path)["upper"]
            if upper.shape != (encoder.context_width, encoder.context_width):
                raise ValueError(f"its shape is {tuple(upper.shape)}")
            return CaptionFactor(upper, len(captions))
        except (SafetensorError, KeyError, ValueError) as error:
            raise MergeError(
                f"The cached caption factor {path} is damaged ({error}). Delete this file and "
                "merge again; it is computed anew."
            ) from error
    factor = _compute_factor(encoder, captions, relative_ridge)
    write_atomically(
        path, lambda temporary: save_file({"upper": factor.upper}, temporary), factor.upper.nbytes
    )
    return factor


def _compute_factor(
    encoder: TextEncoder, captions: Sequence[str], relative_ridge: float
) -> CaptionFactor:
    token_ids = [encoder.tokenize(caption) for caption in captions]
    # The start token is the same in every caption and no concept changes it: it is left out, as in
    # the reference.
    features = torch.cat([encoded[1:].cpu() for encoded in encode_unpadded(encoder, token_ids)])
    return caption_factor(features, len(captions), relative_ridge)


def _positions(
    concept: Concept, prompt: str, token_ids: Sequence[int], encoder: TextEncoder
) -> range:
    for token in concept.tokens:
        if token.name in prompt:
            return constrained_positions(token_ids, encoder.tokenize_words(token.name))
    # A concept without a token: its class noun is the last word of the prompt.
    return constrained_positions(token_ids, encoder.tokenize_words(prompt.split()[-1]))


def _group_rows(features: Tensor) -> list[list[int]]:
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


def _shared_rows(
    rows: Sequence[ConstraintRow],
    features: Tensor,
    groups: Sequence[Sequence[int]],
    strengths: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """One feature row a group (s, d), and the mixing (rows, s) of what its members ask for.

    Members share a row by the mean of what they ask for, weighted by their concepts' strengths.
    """
    mixing = torch.zeros(len(rows), len(groups), dtype=torch.float64)
    for column, group in enumerate(groups):
        weights = torch.tensor(
            [abs(strengths[rows[i].concept]) for i in group], dtype=torch.float64
        )
        share = weights / weights.sum() if weights.sum() > 0 else torch.zeros_like(weights)
        for i, part in zip(group, share, strict=True):
            mixing[i, column] = part * strengths[rows[i].concept]
    return torch.stack([features[group].mean(0) for group in groups]), mixing


def _conflicts(rows: Sequence[ConstraintRow], groups: Sequence[Sequence[int]]) -> Iterator[str]:
    involved = {frozenset((rows[i].concept, rows[i].prompt) for i in group) for group in groups}
    for members in sorted(involved, key=sorted):
        if len({concept for concept, _ in members}) > 1:
            where = " and ".join(f"concept {c + 1} in '{prompt}'" for c, prompt in sorted(members))
            yield (
                f"the same words mean different things to {where}; their mean was used. "
                f"Give each concept its own token."
            )


def _norm(concept: Concept) -> float:
    """Frobenius norm over all layers."""
    total = 0.0
    for delta in concept.deltas.values():
        if isinstance(delta, LowRankDelta):
            up, down = delta.up.double(), delta.down.double()
            total += float(((up.T @ up) * (down @ down.T)).sum())
        else:
            total += float(delta.weight.float().square().sum())
    return math.sqrt(total)


def _check(concepts: Sequence[Concept], encoder: TextEncoder, strengths: Sequence[float]) -> None:
    if not concepts:
        raise MergeError("No concept was given to merge. Connect at least two.")
    if len(strengths) != len(concepts):
        raise MergeError(
            f"{len(strengths)} strengths were given for {len(concepts)} concepts. Give one for "
            "each."
        )
    family = concepts[0].family
    for concept in concepts:
        if concept.family != family:
            raise IncompatibleModelError(
                f"The concepts belong to different models: {concepts[0].describe()} and "
                f"{concept.describe()}. Merge concepts that were trained on the same base model."
            )
        if not concept_prompts(concept):
            raise MergeError(
                f"The concept {concept.describe()} names no word to keep: it has no modifier token "
                "and no constraint prompts. Train it again with a modifier token."
            )
    hashes = {concept.base_hash for concept in concepts if concept.base_hash}
    if len(hashes) > 1:
        raise IncompatibleModelError(
            f"The concepts were trained on different {family.title} checkpoints "
            f"(base hashes {', '.join(sorted(h[:8] for h in hashes))}). Train them on the same one."
        )
    if encoder.context_width != family.context_width:
        raise IncompatibleModelError(
            f"The concepts were trained on {family.title} (text width {family.context_width}); the "
            f"CLIP given has width {encoder.context_width}. Connect the CLIP of the concepts' own "
            "base model."
        )
