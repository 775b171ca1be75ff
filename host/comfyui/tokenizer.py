"""Modifier tokens in ComfyUI prompts: the tokenizer of a cloned CLIP hands out learnt embeddings.

ComfyUI's prompt parser asks the tokenizer for the ids of each stretch of text and accepts
embeddings among them. So weights such as `(<new1> cat:1.2)` and `embedding:` words keep working:
they are parsed before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...concept.concept import Concept
from ...concept.errors import IncompatibleModelError, TokenError
from ...concept.prompts import split_at_tokens
from ...concept.weighted_prompts import as_prompt, weighted_parts
from .unknown_words import tell_of_unknown

_SECOND_OF_TWO = "clip_g"
"""SDXL's second text encoder reads the same prompts as the first"""


class _TokenizerWithWords:
    """A CLIP tokenizer that returns embeddings where the text has a modifier token.

    A word has the same tensors in every prompt, so that it can be found again among tokens.
    """

    def __init__(self, tokenizer: Any, words: Mapping[str, Sequence[Tensor]]) -> None:
        self._tokenizer = tokenizer
        self.words = dict(words)

    def __call__(self, text: str, *args: Any, **kwargs: Any) -> dict[str, list[Any]]:
        start, *_, end = self._tokenizer("")["input_ids"]
        ids: list[Any] = [start]
        for piece in split_at_tokens(text, self.words):
            rows = self.words.get(piece)
            ids += (
                self._tokenizer(piece, *args, **kwargs)["input_ids"][1:-1]
                if rows is None
                else list(rows)
            )
        return {"input_ids": [*ids, end]}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._tokenizer, name)


class _PromptsWithWords:
    """What a prompt's tokenizer does otherwise when it has learnt words: of several vectors they
    stand alone, as an `embedding:` does, so that the end of a chunk does not divide them; and of
    those that it has not learnt the user is told.
    """

    def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> Any:
        known = rows_of_words(self)
        if getattr(self, "embedding_key", "") != _SECOND_OF_TWO:
            tell_of_unknown(text, known)
        long_words = [word for word, rows in known.items() if len(rows) > 1]
        weighs = not kwargs.get("disable_weights", getattr(self, "disable_weights", False))
        if weighs and any(word in text for word in long_words):
            text = as_prompt(
                [
                    (stretch, weight)
                    for part, weight in weighted_parts(text)
                    for stretch in split_at_tokens(part, long_words)
                ]
            )
        return super().tokenize_with_weights(text, *args, **kwargs)  # type: ignore[misc]


def known_tokens(tokenizer: Any) -> dict[str, Tensor]:
    """Modifier tokens that a ComfyUI tokenizer has learnt: token → (vectors, width)."""
    return {token: torch.stack(list(rows)) for token, rows in rows_of_words(tokenizer).items()}


def rows_of_words(tokenizer: Any) -> dict[str, Sequence[Tensor]]:
    """Token → its rows (width), the very tensors that stand in tokenized prompts."""
    inner = tokenizer.tokenizer
    return dict(inner.words) if isinstance(inner, _TokenizerWithWords) else {}


def with_concept_tokens(tokenizer: Any, concept: Concept) -> Any:
    """A copy of a CLIP's tokenizer that knows the concept's modifier tokens; the original stays."""
    result = copy.copy(tokenizer)
    for encoder, words in concept.embeddings().items():
        part = getattr(tokenizer, encoder, None)
        if words and (part is None or part.embedding_size != next(iter(words.values())).shape[1]):
            raise IncompatibleModelError(
                f"The concept's tokens are for the text encoder {encoder} of "
                f"{concept.family.title}; this CLIP ({type(tokenizer).__name__}) has none. Connect "
                "the CLIP of the concept's own base model."
            )
        if words:
            setattr(result, encoder, _with_words(part, words))
    return result


def _with_words(tokenizer: Any, words: Mapping[str, Tensor]) -> Any:
    known = rows_of_words(tokenizer)
    for token in words:
        if token in known:
            raise TokenError(
                f"The trigger word {token} is already taken by another concept on this CLIP. "
                f"Rename one of the two with LoadConcept, or merge the concepts first."
            )
    inner = tokenizer.tokenizer
    plain = inner._tokenizer if known else inner
    result = copy.copy(tokenizer)
    new = {token: tuple(rows.unbind()) for token, rows in words.items()}
    result.tokenizer = _TokenizerWithWords(plain, {**known, **new})
    if not isinstance(result, _PromptsWithWords):
        kind = type(tokenizer)
        result.__class__ = type(kind.__name__, (_PromptsWithWords, kind), {})
    return result
