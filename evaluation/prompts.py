"""Prompts for an evaluation, and what of a prompt a picture is compared with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..concept.concept import Concept, ModifierToken
from ..concept.errors import ConfigError
from ..concept.prompts import subject
from ..concept.weighted_prompts import weighted_parts

PROMPTS = (
    "photo of a {}",
    "photo of a {} on the beach",
    "photo of a {} in deep snow",
    "photo of a {} in front of a brick wall",
    "photo of a {} in a sunny garden",
    "photo of a {} on a kitchen table",
    "a {} at night under a street lamp",
    "a {} with mountains in the background",
    "a {} on a boat at sea",
    "a {} in the desert",
    "a {} beside a vase of flowers",
    "a {} next to a red ball",
    "a {} under a yellow umbrella",
    "a {} wrapped in a blue blanket",
    "a {} behind a stack of books",
    "a watercolour painting of a {}",
    "a pencil drawing of a {}",
    "an oil painting of a {} in the style of an old master",
    "a {} made of paper",
    "a small wooden figure of a {}",
)
"""Twenty, as many as the paper takes, of its kinds: new places, other things beside it, styles,
materials. The wording is ours.
"""
MOST_PROMPTS = 1000
_SPACES = re.compile(r"\s+")


class Taught(Protocol):
    """What an evaluation asks of a concept, or of several that are drawn together."""

    @property
    def tokens(self) -> Sequence[ModifierToken]: ...
    @property
    def constraint_prompts(self) -> Sequence[str]: ...
    def describe(self) -> str: ...


@dataclass(frozen=True)
class Together:
    """Concepts that are drawn in one picture, each at its own words (routed)."""

    concepts: tuple[Concept, ...]

    def __post_init__(self) -> None:
        names = [token.name for token in self.tokens]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ConfigError(
                f"Two of the concepts have the trigger word {twice}, so nobody could tell which of "
                f"them a picture should show. Rename one in Load Concept."
            )

    @property
    def tokens(self) -> Sequence[ModifierToken]:
        return tuple(token for concept in self.concepts for token in concept.tokens)

    @property
    def constraint_prompts(self) -> Sequence[str]:
        return tuple(prompt for one in self.concepts for prompt in one.constraint_prompts)

    def describe(self) -> str:
        return ", ".join(concept.describe() for concept in self.concepts)


def read_prompts(text: str) -> tuple[str, ...]:
    """A prompt a line, without those that are empty or there twice; ours where there is none."""
    lines = tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if len(lines) > MOST_PROMPTS:
        raise ConfigError(f"{len(lines)} prompts were given. Give at most {MOST_PROMPTS}.")
    return lines or PROMPTS


def names_of(concept: Taught) -> list[str]:
    """What it is called in prompts, `<new1> cat`: a name for each of its words, as a rule one."""
    names = [subject(token.name, token.class_noun) for token in concept.tokens]
    return names or [class_of(concept)]


def concept_prompt(prompt: str, concept: Taught) -> str:
    """The prompt with the concept in place of `{}`: `<new1> cat`; of several words all of them."""
    if not concept.tokens:
        return plain_prompt(prompt, concept)
    return prompt.replace("{}", " and a ".join(names_of(concept)))


def subjects_in(prompt: str, concept: Taught, names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Of the names, which a prompt has, each with how it is written there: `<new1> cat`, or the
    trigger word alone.
    """
    words = dict(zip(names_of(concept), (token.name for token in concept.tokens), strict=False))
    found: list[tuple[str, str]] = []
    for name in names:
        ways = [text for text in (name, words.get(name, "")) if text and text in prompt]
        found += [(name, text) for text in ways[:1]]
    return tuple(found)


def plain_prompt(prompt: str, concept: Taught) -> str:
    """The same as the base model can read it: the class noun in place of the concept's word. It is
    also the text that pictures are compared with, once `unweighted`.
    """
    text = prompt.replace("{}", class_of(concept)) if "{}" in prompt else prompt
    for token in concept.tokens:
        text = text.replace(subject(token.name, token.class_noun), token.class_noun)
        text = text.replace(token.name, token.class_noun)
    return _SPACES.sub(" ", text).strip()


def unweighted(prompt: str) -> str:
    """What a prompt with weights, `(cat:1.2)`, says."""
    return "".join(text for text, _ in weighted_parts(prompt))


def class_of(concept: Taught) -> str:
    """The everyday word; of several words `cat and a dog`; of a concept without a trigger word the
    first prompt that it was taught by.
    """
    nouns = [token.class_noun for token in concept.tokens] or [*concept.constraint_prompts[:1]]
    if not nouns or not all(nouns):
        raise ConfigError(
            f"{concept.describe()} does not say which everyday word it belongs to, and pictures "
            f"are compared with prompts that hold it. Set class_noun in Load Concept, or "
            f"--class-noun of `custom-diffusion import`; or write prompts without {{}}."
        )
    return " and a ".join(nouns)


def check_prompts(prompts: Sequence[str], concept: Taught) -> list[str]:
    """What a user should know of them, a sentence each."""
    names = [token.name for token in concept.tokens]
    without = [p for p in prompts if "{}" not in p and not any(name in p for name in names)]
    if not names or not without:
        return []
    return [
        f"{len(without)} of {len(prompts)} prompts do not name the concept, {without[0][:60]!r} "
        f"for one: write {{}} or {names[0]} where it belongs."
    ]
