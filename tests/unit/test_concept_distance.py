"""How close concepts lie, against the generalised eigenvalues that their overlap is the root of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from custom_diffusion.concept.errors import MergeError, TokenError
from custom_diffusion.merge.distance import PairDistance, concept_distances
from custom_diffusion.merge.rows import constraint_features
from support.concepts import random_concept
from support.merging import CAPTIONS, CAT, DOG, RIDGE, VASE, WIDTH, knowing, merge
from support.text import RecurrentTextEncoder


def distances(*concepts: object) -> list[PairDistance]:
    return concept_distances(
        concepts,  # type: ignore[arg-type]
        RecurrentTextEncoder(WIDTH),
        captions=CAPTIONS,
        relative_ridge=RIDGE,
    )


def near(size: float) -> object:
    """The cat again, with another trigger word whose vector is near the cat's."""
    (token,) = CAT.tokens
    noise = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(5))
    vector = token.embeddings["clip_l"] + size * noise
    other = replace(token, name="<new9>", embeddings={"clip_l": vector})
    return replace(CAT, tokens=(other,))


def test_overlap_is_the_largest_principal_cosine_in_the_metric_of_a_merge() -> None:
    encoder = knowing([CAT, DOG])
    rows, features = constraint_features([CAT, DOG], encoder)
    a, b = (
        features[[i for i, r in enumerate(rows) if r.concept == n and not r.still]].numpy()
        for n in (0, 1)
    )
    base = RecurrentTextEncoder(WIDTH)
    read = [base.encode(torch.tensor([base.tokenize(c)]))[0, 1:] for c in CAPTIONS]
    c = torch.cat(read).double().numpy()
    gram = c.T @ c
    gram += RIDGE * np.trace(gram) / WIDTH * np.eye(WIDTH)
    inverse = np.linalg.inv(gram)
    aa, ab, bb = a @ inverse @ a.T, a @ inverse @ b.T, b @ inverse @ b.T
    squared = np.linalg.eigvals(np.linalg.solve(aa, ab) @ np.linalg.solve(bb, ab.T)).real.max()
    (found,) = distances(CAT, DOG)
    assert found.overlap == pytest.approx(np.sqrt(squared), rel=1e-4)
    words = [t.tokens[0].embeddings["clip_l"][0] for t in (CAT, DOG)]
    assert found.words == pytest.approx(float(torch.cosine_similarity(*words, dim=0)), abs=1e-6)


def test_it_foretells_what_a_merge_has_to_damp() -> None:
    overlaps = []
    for size in (1e-3, 1e-1, 1.0):
        (found,) = distances(CAT, near(size))
        _, report = merge([CAT, near(size)])  # type: ignore[list-item]
        overlaps.append(found.overlap)
        if report.shared_rows == len(report.rows):  # else near ones became one
            assert report.condition >= 0.99 * found.condition
    assert overlaps == sorted(overlaps, reverse=True)
    (same,) = distances(CAT, near(0.0))
    assert same.overlap == pytest.approx(1, abs=1e-6) and same.verdict().startswith("nearly one")
    assert same.words == pytest.approx(1)


def test_every_pair_is_there_whatever_the_order() -> None:
    pairs = distances(CAT, DOG, VASE)
    assert [(p.first, p.second) for p in pairs] == [(0, 1), (0, 2), (1, 2)]
    turned = distances(VASE, DOG, CAT)
    assert [p.overlap for p in turned] == pytest.approx([p.overlap for p in reversed(pairs)])


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(TokenError, match="<new1>"):
        distances(CAT, CAT)
    with pytest.raises(MergeError, match="No concept"):
        distances()


def test_concepts_without_a_trigger_word_have_no_cosine_of_words() -> None:
    plain = random_concept(None, constraint_prompts=("moongate",), seed=8)
    (found,) = distances(CAT, plain)
    assert found.words != found.words and 0 <= found.overlap <= 1
