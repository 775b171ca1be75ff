"""Where a modifier token starts: at a rare word piece, or at a word the user names."""

import hashlib
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...concept.concept import Concept, same_vectors
from ...concept.errors import ConfigError, TokenError
from ...concept.text import TextEncoder
from ..data.training_concept import TrainingConcept

# Pieces of CLIP's vocabulary that mean next to nothing: two that only occur inside words, and a
# word. The paper's choice (Fig. 15): random vectors drift more. Their ids: 42170, 47629, 43514.
RARE_PIECES = ("ktn", "pll", "ucd</w>")
_OWN_SHARE = 0.25
"""Of a row's length: what is added to it so that no other name has the same"""


def initial_embedding(
    encoder: TextEncoder, initializer: str, token: str = "<new1>"
) -> dict[str, Tensor]:
    """Start of a modifier token: encoder name → (1, width), float32.

    `<new1>`, `<new2>` and `<new3>` start at the rare pieces, as the reference's. Every other name
    starts near one of them, at a place of its own: words that start alike are hard to tell apart in
    a merge, and where they do not learn they stay alike. Raises TokenError when the initializer is
    not one word of the vocabulary.
    """
    if initializer.strip():
        ids = encoder.tokenize_words(initializer)
        if len(ids) != 1:
            raise TokenError(
                f"The initializer {initializer!r} is {len(ids)} pieces in CLIP's vocabulary; one "
                f"whole word is needed. Use a common word, the class noun for example, or leave it "
                f"empty."
            )
        return encoder.vocabulary_row(ids[0])
    numbered = re.fullmatch(r"<new([123])>", token)
    number = int(numbered[1]) - 1 if numbered else _number_of(token)
    rows = encoder.vocabulary_row(encoder.piece_id(RARE_PIECES[number % len(RARE_PIECES)]))
    return rows if numbered else moved_by_name(rows, token)


def moved_by_name(rows: Mapping[str, Tensor], token: str) -> dict[str, Tensor]:
    """Rows a quarter of their length away from these, in a direction that the name alone gives."""
    moved = {}
    for encoder, row in rows.items():
        generator = torch.Generator().manual_seed(_number_of(f"{encoder} {token}"))
        direction = torch.randn(row.shape, generator=generator)
        moved[encoder] = row + _OWN_SHARE * row.norm() * (direction / direction.norm()).to(row)
    return moved


def words_to_teach(
    training_concepts: Sequence[TrainingConcept],
    earlier: Concept,
    encoder: TextEncoder,
    device: torch.device,
) -> dict[str, dict[str, nn.Parameter]]:
    """The modifier tokens of a run as parameters: encoder name → token → (vectors, width).

    Those that `earlier` has learnt already go on from there; no two start alike. Raises ConfigError
    when two concepts have one token.
    """
    with_token = [concept for concept in training_concepts if concept.token]
    names = [concept.token for concept in with_token]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"The concepts' trigger words are {', '.join(names)}. Concepts that are trained "
            f"together need one each: rename those that are the same."
        )
    learnt = {token.name: token.embeddings for token in earlier.tokens}
    words: dict[str, dict[str, nn.Parameter]] = {}
    began: list[str] = []
    for concept in with_token:
        rows = learnt.get(concept.token)
        if rows is None:
            rows = initial_embedding(encoder, concept.initializer, concept.token)
            others = [{name: words[name][token] for name in words} for token in began]
            if any(same_vectors(rows, other) for other in [*others, *learnt.values()]):
                rows = moved_by_name(rows, concept.token)
        began.append(concept.token)
        for name, row in rows.items():
            own = row.detach().to(device, torch.float32, copy=True)
            words.setdefault(name, {})[concept.token] = nn.Parameter(own)
    return words


def _number_of(text: str) -> int:
    """Another one for every text: a checksum of 32 bits has the same for some words."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def drift(
    words: Mapping[str, Mapping[str, Tensor]], began: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, float]:
    """Token → distance of its embedding from where it began, over its length then; with several
    text encoders the largest.
    """
    far: dict[str, float] = {}
    for name, rows in words.items():
        for token, row in rows.items():
            first = began[name][token]
            moved = float((row.detach() - first).norm() / first.norm())
            far[token] = max(far.get(token, 0.0), moved)
    return far
