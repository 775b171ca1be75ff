"""Where a modifier token starts: at a rare word piece, or at a word the user names."""

import re
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...concept.concept import Concept
from ...concept.errors import ConfigError, TokenError
from ...concept.text import TextEncoder
from ..data.training_concept import TrainingConcept

# Pieces of CLIP's vocabulary that mean next to nothing: two that only occur inside words, and a
# word. The paper's choice (Fig. 15): random vectors drift more. Their ids: 42170, 47629, 43514.
RARE_PIECES = ("ktn", "pll", "ucd</w>")


def token_number(token: str) -> int:
    """Which rare piece a token starts from: `<new2>` from the second, so that tokens differ."""
    digits = re.search(r"(\d+)>$", token)
    return int(digits[1]) - 1 if digits else zlib.crc32(token.encode())


def initial_embedding(encoder: TextEncoder, initializer: str, index: int = 0) -> dict[str, Tensor]:
    """Start of the `index`-th modifier token of a run: encoder name → (1, width), float32.

    Raises TokenError when the initializer is not one word of the vocabulary.
    """
    if not initializer.strip():
        return encoder.vocabulary_row(encoder.piece_id(RARE_PIECES[index % len(RARE_PIECES)]))
    ids = encoder.tokenize_words(initializer)
    if len(ids) != 1:
        raise TokenError(
            f"The initializer {initializer!r} is {len(ids)} pieces in CLIP's vocabulary; one whole "
            f"word is needed. Use a common word, the class noun for example, or leave it empty."
        )
    return encoder.vocabulary_row(ids[0])


def words_to_teach(
    training_concepts: Sequence[TrainingConcept],
    start: Concept,
    encoder: TextEncoder,
    device: torch.device,
) -> dict[str, dict[str, nn.Parameter]]:
    """The modifier tokens of a run as parameters: encoder name → token → (vectors, width).

    Those that `start` has learnt already go on from there. Raises ConfigError when two concepts
    have one token.
    """
    with_token = [concept for concept in training_concepts if concept.token]
    names = [concept.token for concept in with_token]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"The concepts' modifier tokens are {', '.join(names)}. Concepts that are taught "
            f"together need a token each: rename those that are alike."
        )
    learnt = {token.name: token.embeddings for token in start.tokens}
    words: dict[str, dict[str, nn.Parameter]] = {}
    for concept in with_token:
        rows = learnt.get(concept.token) or initial_embedding(
            encoder, concept.initializer, token_number(concept.token)
        )
        for name, row in rows.items():
            own = row.detach().to(device, torch.float32, copy=True)
            words.setdefault(name, {})[concept.token] = nn.Parameter(own)
    return words


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
