"""One thing to teach: its pictures, its words, and what must not change meanwhile.

Checked when it is made, before any time is spent on it.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from ...concept.errors import DataError
from ...concept.prompts import DEFAULT_TEMPLATE, check_modifier_token, subject
from .captioned import CaptionedImage


@dataclass(frozen=True)
class TrainingConcept:
    """One thing to teach: its pictures, its words, and what must not change meanwhile."""

    images: tuple[CaptionedImage, ...]
    class_noun: str
    token: str = ""
    """The new word; empty to teach the class noun itself, a category that the model lacks."""
    initializer: str = ""
    """Word whose embedding the token starts from; empty for a rare token."""
    regularization: tuple[CaptionedImage, ...] = ()
    template: str = DEFAULT_TEMPLATE
    """What is said of it; STYLE_TEMPLATE for a style, whose class noun is `art`, say."""
    weight: float = 1.0
    """What its pictures count beside those of others that are taught together"""

    @property
    def subject(self) -> str:
        """`<new1> cat`"""
        return subject(self.token, self.class_noun)

    @property
    def prompt(self) -> str:
        """`photo of a <new1> cat`"""
        return instance_caption(self.token, self.class_noun, self.template)

    def __post_init__(self) -> None:
        if self.token:
            check_modifier_token(self.token)
        elif self.initializer:
            raise DataError(
                f"The initializer {self.initializer!r} has no trigger word to start. Give a "
                f"token, or leave the initializer empty."
            )
        if not self.images:
            raise DataError(
                "No instance images were given. Connect 4 to 20 pictures of the concept."
            )
        if not any(image.weight for image in self.images):
            raise DataError(
                f"The weights of all {len(self.images)} pictures of the {self.class_noun} are 0, "
                f"so nothing could be learnt. Give one of them a weight above 0."
            )
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise DataError(
                f"The weight of the concept {self.subject!r} is {self.weight}; needed is a number "
                f"above 0. Leave a concept out that should not count."
            )
        if not self.class_noun.strip():
            raise DataError(
                "The class noun is empty. Write the everyday word for the subject: cat, mug, chair."
            )
        for image in self.images:
            if any(self.token not in one for one in (image.caption, *image.choices)):
                raise DataError(
                    f"The caption {image.caption!r} of {image.name} does not contain the trigger "
                    f"word {self.token}, so nothing could be learnt from it. Write it like "
                    f"'{self.prompt}'."
                )
        taught = {_place(image) for image in self.images} - {None}
        both = [image.name for image in self.regularization if _place(image) in taught]
        if both:
            raise DataError(
                f"{both[0]} and {len(both) - 1} more are given as pictures of the concept and as "
                f"regularization. Regularization pictures show the ordinary {self.class_noun}: "
                f"choose another folder for them, or none."
            )
        for image in self.regularization:
            if self.token and self.token in image.caption:
                raise DataError(
                    f"The regularization caption {image.caption!r} of {image.name} contains the "
                    f"trigger word {self.token}. Regularization images show the ordinary class: "
                    f"remove the word from their captions."
                )


def _place(image: CaptionedImage) -> str | None:
    """Of a file, whatever links lead to it."""
    return os.path.realpath(image.source) if isinstance(image.source, Path) else None


def instance_caption(token: str, class_noun: str, template: str = DEFAULT_TEMPLATE) -> str:
    """`photo of a <new1> cat`"""
    return template.format(subject(token, class_noun))
