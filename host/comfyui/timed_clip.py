"""A CLIP whose new words are class words for a part of the sampling.

ComfyUI's own schedule of prompts is used: a prompt becomes several conditionings, each with its
`clip_start_percent` and `clip_end_percent`, and its samplers take the one whose time it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from ...composition.timing import Span, parts_of
from ...concept.concept import Concept
from .tokenizer import rows_of_words

PLAIN = "custom_diffusion_plain"
"""In a conditioning: new words of its prompt are class words there"""
Entry = tuple[Any, ...]
"""(token or embedding, weight, …) of a tokenized prompt"""


@dataclass(frozen=True)
class TimedWord:
    """A new word, what it is otherwise, and when it is itself."""

    token: str
    class_noun: str
    span: Span


def timed_clip(clip: Any, concepts: Sequence[Concept], span: Span) -> Any:
    """A clone of a CLIP that knows the concepts' words: outside the span they are class words."""
    words = [TimedWord(t.name, t.class_noun, span) for c in concepts for t in c.tokens]
    timed = clip.clone()
    if not isinstance(timed, _TimedPrompts):
        kind = type(timed)
        timed.__class__ = type(kind.__name__, (_TimedPrompts, kind), {})
    timed.timed_words = [*getattr(clip, "timed_words", ()), *words]
    return timed


class _TimedPrompts:
    """What a CLIP does otherwise when words of it are timed."""

    tokenizer: Any
    timed_words: Sequence[TimedWord]

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        cloned = super().clone(*args, **kwargs)  # type: ignore[misc]
        cloned.__class__ = type(self)
        cloned.timed_words = self.timed_words
        return cloned

    def encode_from_tokens_scheduled(
        self, tokens: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> list[Any]:
        encode = super().encode_from_tokens_scheduled  # type: ignore[misc]
        scheduled = []
        for part in parts_of([word.span for word in self.timed_words]):
            middle = (part.start + part.end) / 2
            absent = [word for word in self.timed_words if middle not in word.span]
            said = plain_tokens(self.tokenizer, tokens, absent)
            for features, options in encode(said, *args, **kwargs):
                start = max(part.start, options.get("clip_start_percent", 0.0))
                end = min(part.end, options.get("clip_end_percent", 1.0))
                if start < end:
                    when = {"clip_start_percent": start, "clip_end_percent": end}
                    scheduled.append([features, {**options, **when, PLAIN: bool(absent)}])
        return scheduled


def plain_tokens(
    tokenizer: Any, tokens: Mapping[str, Any], words: Sequence[TimedWord]
) -> Mapping[str, Any]:
    """A tokenized prompt in which these words are their class nouns."""
    if not words:
        return tokens
    plain = dict(tokens)
    for key, chunks in tokens.items():
        part = getattr(tokenizer, f"clip_{key}", None)
        if part is None:
            continue
        known = rows_of_words(part)
        told = [
            (known[word.token], part.tokenizer(word.class_noun)["input_ids"][1:-1])
            for word in words
            if word.token in known
        ]
        plain[key] = [plain_chunk(chunk, told, part.pad_token) for chunk in chunks]
    return plain


def plain_chunk(
    chunk: Sequence[Entry], words: Sequence[tuple[Sequence[Any], Sequence[int]]], padding: int
) -> list[Entry]:
    """A tokenized chunk in which new words are their class nouns; its length stays.

    `words` has the rows of each new word, the very tensors that stand in prompts, and the numbers
    of its noun, which is not written twice where it follows anyhow.
    """
    said: list[Entry] = []
    place = 0
    while place < len(chunk):
        rows, noun = next((w for w in words if _stands(w[0], chunk, place)), ((), ()))
        if not rows:
            said.append(chunk[place])
            place += 1
            continue
        weight = chunk[place][1:]
        place += len(rows)
        follows = [entry[0] for entry in chunk[place : place + len(noun)]]
        if not all(isinstance(token, Integral) for token in follows) or follows != list(noun):
            said += [(token, *weight) for token in noun]
    if len(said) > len(chunk):
        return [*said[: len(chunk) - 1], said[-1]]
    blank = (padding, 1.0, *(0 for _ in chunk[0][2:]))
    return [*said, *[blank] * (len(chunk) - len(said))]


def _stands(rows: Sequence[Any], chunk: Sequence[Entry], place: int) -> bool:
    found = [entry[0] for entry in chunk[place : place + len(rows)]]
    return len(found) == len(rows) and all(a is b for a, b in zip(found, rows, strict=True))
