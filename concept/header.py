"""What the header of a concept file says, written and read: the one place that knows its keys, and
that decides whether a stranger's is one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, get_args

from .checks import MOST_WORDS
from .concept import Concept, Scope
from .errors import ConceptFileError, OtherFileError, TokenError
from .layers import FAMILIES, Family
from .plain import plain_words, read_json
from .prompts import check_modifier_token

FORMAT = "custom-diffusion-concept"
FORMAT_VERSION = "1.0"

_LONGEST = 1000
"""Characters of a word, a class noun, a date and the like"""
_LONGEST_PROMPT = 4000
_MOST_STEPS = 10**9


@dataclass(frozen=True)
class Word:
    """A modifier token without its embeddings."""

    name: str
    class_noun: str
    initializer: str


@dataclass(frozen=True)
class ConceptHeader:
    """All that a concept file says besides its tensors; every text can be shown and sent."""

    family: Family
    words: tuple[Word, ...]
    base_hash: str
    constraint_prompts: tuple[str, ...]
    provenance: Mapping[str, Any]
    """Plain JSON values"""
    method: str
    steps: int | None
    created: str
    """ISO 8601, UTC"""
    scope: Scope = "every word"

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, str]) -> ConceptHeader:
        """Of the metadata of a .safetensors. Raises ConceptFileError; OtherFileError where it is no
        concept of ours.
        """
        _check_format(path, metadata)
        try:
            provenance = read_json(metadata.get("provenance", "{}"))
            if not isinstance(provenance, dict):
                raise ValueError("provenance is not a JSON object")
            return cls(
                family=FAMILIES[metadata["base_family"]],
                words=_words(read_json(metadata.get("tokens", "[]"))),
                base_hash=_text("base_hash", metadata.get("base_hash", "")),
                constraint_prompts=_prompts(read_json(metadata.get("constraint_prompts", "[]"))),
                provenance=provenance,
                method=_text("provenance.method", provenance.get("method") or ""),
                steps=_steps(provenance.get("steps")),
                created=_text("created", metadata.get("created", "")),
                scope=_scope(metadata.get("scope", "every word")),
            )
        except TokenError as error:
            raise ConceptFileError(f"{path.name}: {error}") from error
        except ValueError as error:
            raise damage(path, error) from error


def damage(path: Path, reason: Exception) -> ConceptFileError:
    """That the file calls itself a concept file and is none."""
    return ConceptFileError(
        f"{path.name} calls itself a concept file but is damaged ({reason}). Save the concept "
        "again, or take another copy of the file."
    )


def metadata_of(concept: Concept, title: str) -> dict[str, str]:
    """The metadata of the concept's file."""
    tokens = [
        {"name": t.name, "class_noun": t.class_noun, "initializer": t.initializer}
        for t in concept.tokens
    ]
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base_family": concept.family.name,
        "base_hash": concept.base_hash,
        "tokens": json.dumps(tokens, ensure_ascii=False),
        "constraint_prompts": json.dumps(concept.constraint_prompts, ensure_ascii=False),
        "provenance": json.dumps(concept.provenance, ensure_ascii=False),
        "scope": concept.scope,
        "created": now,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{concept.family.architecture}/lora",
        "modelspec.implementation": "custom-diffusion",
        "modelspec.title": plain_words(title),
        "modelspec.date": now,
        "modelspec.trigger_phrase": ", ".join(
            f"{t.name} {t.class_noun}".strip() for t in concept.tokens
        ),
    }


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise OtherFileError(
            f"{path.name} is a .safetensors file but not a concept: its metadata has no 'format: "
            f"{FORMAT}'. Of a LoRA, a delta or an embedding, the node Load Concept and the command "
            "`custom-diffusion import` make one."
        )
    version = metadata.get("format_version", "")
    readable = FORMAT_VERSION.split(".")[0]
    if not version:
        raise ConceptFileError(
            f"{path.name} is a concept without a format version; {readable}.x is needed. "
            f"Its metadata was damaged: save the concept again, or take another copy of the file."
        )
    if version.split(".")[0] != readable:
        raise ConceptFileError(
            f"{path.name} has concept format {version[:100]}; this version of the pack reads "
            f"{readable}.x. Update the pack."
        )
    family = metadata.get("base_family", "")
    if family not in FAMILIES:
        raise ConceptFileError(
            f"{path.name} was trained on the unknown model family {family[:100]!r}; "
            f"known are {', '.join(FAMILIES)}. Update the pack."
        )


def _words(described: Any) -> tuple[Word, ...]:
    if not isinstance(described, list) or not all(isinstance(word, dict) for word in described):
        raise ValueError("tokens is not a list of objects")
    if len(described) > MOST_WORDS:
        raise ValueError(f"it has {len(described)} tokens; {MOST_WORDS} are the most")
    words = tuple(
        Word(
            check_modifier_token(_text("a token's name", word.get("name"))),
            _text("a token's class_noun", word.get("class_noun")),
            _text("a token's initializer", word.get("initializer", "")),
        )
        for word in described
    )
    if len({word.name for word in words}) < len(words):
        raise ValueError("it has a token twice")
    return words


def _prompts(described: Any) -> tuple[str, ...]:
    if not isinstance(described, list):
        raise ValueError("constraint_prompts is not a list of texts")
    return tuple(_text("a constraint prompt", prompt, _LONGEST_PROMPT) for prompt in described)


def _scope(value: str) -> Scope:
    for known in get_args(Scope):
        if value == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"its scope is {value[:100]!r}; known are {', '.join(get_args(Scope))}")


def _steps(value: Any) -> int | None:
    if value is None or (type(value) is int and 0 <= value <= _MOST_STEPS):
        return value
    raise ValueError("provenance.steps is no number of steps")


def _text(what: str, value: Any, longest: int = _LONGEST) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {type(value).__name__}, a text is needed")
    if len(value) > longest:
        raise ValueError(f"{what} has {len(value)} characters; {longest} are the most")
    return plain_words(value)
