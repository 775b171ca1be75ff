"""Prompts for an evaluation, and what of a prompt a picture is compared with."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..concept.concept import Concept
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


def read_prompts(text: str) -> tuple[str, ...]:
    """A prompt a line, without those that are empty or there twice; ours where there is none."""
    lines = tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if len(lines) > MOST_PROMPTS:
        raise ConfigError(f"{len(lines)} prompts were given. Give at most {MOST_PROMPTS}.")
    return lines or PROMPTS


def names_of(concept: Concept) -> list[str]:
    """What it is called in prompts, `<new1> cat`: a name for each of its words, as a rule one."""
    names = [subject(token.name, token.class_noun) for token in concept.tokens]
    return names or [class_of(concept)]


def concept_prompt(prompt: str, concept: Concept) -> str:
    """The prompt with the concept in place of `{}`: `<new1> cat`; of several words all of them."""
    if not concept.tokens:
        return plain_prompt(prompt, concept)
    return prompt.replace("{}", " and a ".join(names_of(concept)))


def plain_prompt(prompt: str, concept: Concept) -> str:
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


def class_of(concept: Concept) -> str:
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


def check_prompts(prompts: Sequence[str], concept: Concept) -> list[str]:
    """What a user should know of them, a sentence each."""
    names = [token.name for token in concept.tokens]
    without = [p for p in prompts if "{}" not in p and not any(name in p for name in names)]
    if not names or not without:
        return []
    return [
        f"{len(without)} of {len(prompts)} prompts do not name the concept, {without[0][:60]!r} "
        f"for one: write {{}} or {names[0]} where it belongs."
    ]
