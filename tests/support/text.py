"""A small causal text encoder without pretrained weights, for tests of the merge.

Each word has a random embedding; a recurrent state mixes it with all the words before it. So the
features of a word depend on what precedes it and never on what follows it, as in CLIP, and every
difference between two prompts is carried to their last position.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence

import torch
from custom_diffusion.concept.prompts import split_at_tokens
from custom_diffusion.concept.text import TextFeatures
from torch import Tensor

VOCABULARY = 4096
START, END = 0, 1
_MEMORY = 1.2
"""How strongly the words before a word take part in its features."""
_LENGTH = 27.5
"""Typical length of a CLIP feature; much of it is one direction that all words share."""


class RecurrentTextEncoder:
    """Fulfils `concept.text.TextEncoder`; the same seed gives the same features.

    `calls` counts the batches encoded; with `refuse` set, encoding raises instead.
    """

    context_length = 77

    def __init__(
        self,
        width: int = 64,
        seed: int = 0,
        name: str = "clip_l",
        embeddings: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.context_width = width
        self.calls = 0
        self.refuse = False
        self._name, self._seed = name, seed
        self._embeddings = dict(embeddings or {})
        self._word_ids: dict[str, list[int]] = {}
        next_id = VOCABULARY
        for token, rows in self._embeddings.items():
            self._word_ids[token] = list(range(next_id, next_id + len(rows)))
            next_id += len(rows)
        draw = torch.Generator().manual_seed(seed)
        self._table = torch.randn(VOCABULARY, width, generator=draw)
        self._mix = torch.randn(width, width, generator=draw) * width**-0.5
        self._out = torch.randn(width, width, generator=draw) * width**-0.5
        self._common = torch.randn(width, generator=draw)

    def tokenize(self, prompt: str) -> list[int]:
        return [START, *self.tokenize_words(prompt)[: self.context_length - 2], END]

    def tokenize_words(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in split_at_tokens(text, self._word_ids):
            ids += self._word_ids.get(piece) or [
                2 + zlib.crc32(word.encode()) % (VOCABULARY - 2)
                for word in re.findall(r"\w+|[^\w\s]", piece.lower())
            ]
        return ids

    def pad(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        length = self.context_length
        return torch.tensor([[*ids, *[END] * (length - len(ids))] for ids in token_ids])

    def encode(self, token_ids: Tensor) -> Tensor:
        if self.refuse:
            raise AssertionError("nothing should be encoded here")
        self.calls += 1
        # In float64, rounded at the end: so the features of a prompt do not depend on how many
        # others are encoded beside it, whatever this processor's kernels do for which size.
        table, mix, out, common = (
            tensor.double() for tensor in (self._rows(), self._mix, self._out, self._common)
        )
        state = table.new_zeros(len(token_ids), self.context_width)
        features = []
        for position in range(token_ids.shape[1]):
            state = torch.tanh(_MEMORY * state @ mix + table[token_ids[:, position]])
            features.append(common + state @ out)
        stacked = torch.stack(features, dim=1)
        return (_LENGTH * stacked / stacked.norm(dim=-1, keepdim=True)).float()

    def _rows(self) -> Tensor:
        return torch.cat([self._table, *(rows.float() for rows in self._embeddings.values())])

    def encode_with_pooled(self, token_ids: Tensor) -> TextFeatures:
        return TextFeatures(self.encode(token_ids))

    def with_tokens(self, embeddings: Mapping[str, Mapping[str, Tensor]]) -> RecurrentTextEncoder:
        return RecurrentTextEncoder(
            self.context_width,
            self._seed,
            self._name,
            {**self._embeddings, **embeddings.get(self._name, {})},
        )

    def piece_id(self, piece: str) -> int:
        return 2 + zlib.crc32(piece.encode()) % (VOCABULARY - 2)

    def vocabulary_row(self, token_id: int) -> dict[str, Tensor]:
        return {self._name: self._table[token_id : token_id + 1].clone()}

    def fingerprint(self) -> str:
        known = [float(rows.double().sum()) for rows in self._embeddings.values()]
        return f"recurrent {self.context_width} {self._seed} {list(self._embeddings)} {known}"
