"""Which words an edit moves that nobody named: the nearest of those that captions use."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..concept.text import TextEncoder, encode_unpadded
from .captions import regularization_captions
from .edits import Edit

NEIGHBOUR_TEMPLATE = "photo of a {}"
WATCHED = 12
"""How many words are reported"""
_MOST_WORDS = 250
_WORD = re.compile(r"[^\W\d_]{3,}")


def word_features(
    words: Sequence[str], encoder: TextEncoder, template: str = NEIGHBOUR_TEMPLATE
) -> Tensor:
    """Of each word's last piece in an ordinary prompt, (n, d), float64."""
    prompts = [encoder.tokenize(template.format(word)) for word in words]
    rows = encode_unpadded(encoder, prompts)
    return torch.stack([features[-2] for features in rows]).double().cpu()


def nearest_words(
    captions: Sequence[str],
    encoder: TextEncoder,
    edits: Sequence[Edit],
    preserved: Sequence[str],
    change: Tensor,
) -> list[str]:
    """The captions' words that the edit moves most, most first: by |M c| / |c|, where M (d, d) is
    what an edit does to features before any layer reads them.
    """
    known = {edit.word for edit in edits} | set(preserved)
    texts = captions or regularization_captions()
    counted = Counter(word for text in texts for word in set(_WORD.findall(text.lower())))
    words = [word for word, _ in counted.most_common(_MOST_WORDS) if word not in known]
    if not words:
        return []
    features = word_features(words, encoder, "{}")  # by itself: hundreds are read
    moved = (features @ change.T).norm(dim=1) / features.norm(dim=1)
    return [words[int(index)] for index in moved.argsort(descending=True, stable=True)[:WATCHED]]
