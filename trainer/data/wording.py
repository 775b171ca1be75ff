"""What a picture is captioned with at a step, where the settings let captions vary; and trigger
words that captions lack.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...concept.prompts import subject
from ..config import TrainConfig
from .captioned import CaptionedImage


@dataclass(frozen=True)
class Wording:
    """All that may be said of a view."""

    prefix: str
    """Words for its size, before whatever is said"""
    captions: tuple[str, ...]
    """Of its picture, the first one first"""
    plain: str
    """What is said of the concept without a caption: `photo of a <new1> cat`"""


def varies(config: TrainConfig) -> bool:
    return bool(
        config.caption_lines == "any"
        or config.shuffle_captions
        or config.caption_dropout
        or config.plain_captions
    )


def worded(wording: Wording, config: TrainConfig, rng: random.Random) -> str:
    """A prompt for it, as the settings say: nothing at all, the plain one, or one of its captions,
    whose parts between commas are in any order but for the first ones.
    """
    if rng.random() < config.caption_dropout:
        return ""
    if rng.random() < config.plain_captions:
        text = wording.plain
    else:
        text = (
            rng.choice(wording.captions) if config.caption_lines == "any" else wording.captions[0]
        )
        if config.shuffle_captions:
            text = _shuffled(text, config.keep_parts, rng)
    return f"{wording.prefix} {text}".strip()


def _shuffled(caption: str, keep: int, rng: random.Random) -> str:
    parts = [part.strip() for part in caption.split(",")]
    rest = parts[keep:]
    rng.shuffle(rest)
    return ", ".join([*parts[:keep], *rest])


def with_trigger(
    images: Sequence[CaptionedImage], token: str, class_noun: str
) -> tuple[CaptionedImage, ...]:
    """The pictures with captions that all have the trigger word: before the class noun where the
    caption has that as a word, else with it at the start.
    """
    if not token:
        return tuple(images)
    return tuple(
        replace(
            image,
            caption=_triggered(image.caption, token, class_noun),
            choices=tuple(_triggered(one, token, class_noun) for one in image.choices),
            trigger_added=any(token not in one for one in (image.caption, *image.choices)),
        )
        for image in images
    )


def _triggered(caption: str, token: str, class_noun: str) -> str:
    if token in caption:
        return caption
    noun = re.compile(rf"(?<!\w){re.escape(class_noun)}(?!\w)", re.IGNORECASE)
    found = noun.search(caption) if class_noun else None
    if found:
        return f"{caption[: found.start()]}{token} {caption[found.start() :]}"
    return f"{subject(token, class_noun)}, {caption}"
