"""Pictures of an evaluation: which there are, and drawing those that are missing.

A picture is known by its prompt, seed and strength, the folder by everything else. So an evaluation
that was interrupted goes on, and more prompts, seeds or strengths draw only what is new.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from ..concept.atomic import write_text_atomically
from ..concept.concept import Concept
from ..concept.errors import ConfigError, DataError
from ..concept.file import concept_tensors
from ..concept.plain import json_text, read_json
from ..concept.regular_files import read_regular
from ..pictures.kept import claim_folder, save_picture
from .prompts import Taught, class_of, concept_prompt, plain_prompt, subjects_in

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as shares of the picture's edges"""
_MOST_BYTES = 100_000
BASE = 0.0
"""The strength at which there is no concept, and the base model draws"""


@dataclass(frozen=True)
class Trial:
    """A picture to draw."""

    prompt: str
    """As it is drawn; of the base model without the concept's words"""
    seed: int
    strength: float
    subjects: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    """What is to be found in the picture, each with how the prompt calls it"""

    def path(self, folder: Path) -> Path:
        mark = hashlib.blake2b(self.prompt.encode(), digest_size=6).hexdigest()
        strength = str(float(self.strength)).removesuffix(".0")
        return folder / f"strength-{strength}" / f"{mark}-{self.seed}.png"

    def boxes_path(self, folder: Path) -> Path:
        return self.path(folder).with_suffix(".json")

    def is_there(self, folder: Path) -> bool:
        """Whether nothing is left to draw of it."""
        found = not self.subjects or self.boxes_path(folder).is_file()
        return found and self.path(folder).is_file()

    def boxes(self, folder: Path) -> Mapping[str, Box]:
        """Where its subjects are. Raises DataError for a file that does not say it."""
        file = self.boxes_path(folder)
        try:
            found = read_json(read_regular(file, _MOST_BYTES).decode())
            return {str(name): _box(box) for name, box in found.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file} does not say where the subjects of its picture are ({error}). Delete it, "
                f"and evaluate again: the picture is drawn anew."
            ) from error


@dataclass(frozen=True)
class Plan:
    """What is drawn of a concept: every prompt with every seed at every strength, and by the base
    model; and the bare class, `class_count` times, where there are pictures to compare it with.
    """

    concept: Taught
    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1)
    strengths: tuple[float, ...] = (1.0,)
    class_count: int = 0
    subjects: tuple[str, ...] = ()
    """Names of those that are looked for in pictures, to be compared one by one; two or more"""

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds", "strengths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"Of {name} {list(values)} were given. Give some, each once.")
        if not all(map(math.isfinite, self.strengths)):
            raise ConfigError(f"Strengths {list(self.strengths)} were given. Give finite numbers.")
        if BASE in self.strengths:
            raise ConfigError(
                f"Strengths {list(self.strengths)} were given. Leave out 0: it is the base model, "
                f"which is always drawn too."
            )

    def trials(self, strength: float) -> list[Trial]:
        """In the order of prompts, then seeds."""
        words = plain_prompt if strength == BASE else concept_prompt
        prompts = [words(prompt, self.concept) for prompt in self.prompts]
        found = {
            prompt: () if strength == BASE else subjects_in(prompt, self.concept, self.subjects)
            for prompt in prompts
        }
        return [
            Trial(prompt, seed, strength, found[prompt])
            for prompt in prompts
            for seed in self.seeds
        ]

    def class_trials(self, strength: float) -> list[Trial]:
        prompt = f"photo of a {class_of(self.concept)}" if self.class_count else ""
        return [Trial(prompt, seed, strength) for seed in range(self.class_count)]

    def everything(self) -> list[Trial]:
        """Every picture once; what the base model draws comes first."""
        every = [
            trial
            for strength in (BASE, *self.strengths)
            for trial in (*self.trials(strength), *self.class_trials(strength))
        ]
        return list(dict.fromkeys(every))


@dataclass(frozen=True)
class Drawn:
    """Pictures (b, h, w, 3) in 0..1, and of each where its subjects are, if that was asked for."""

    images_bhwc: Tensor
    boxes: Sequence[Mapping[str, Box]] = ()


Draw = Callable[[Sequence[Trial]], Drawn]
"""Trials of one prompt and strength → their pictures"""


def draw_trials(
    folder: Path,
    settings: Mapping[str, Any],
    trials: Sequence[Trial],
    draw: Draw,
    *,
    batch_size: int = 4,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Draws the trials that are not in `folder`. `settings` are what all pictures depend on, as
    plain JSON values; every picture is complete or absent.

    Raises DataError when the folder holds something else, or pictures of other settings.
    """
    claim_folder(folder, settings)
    missing = [trial for trial in trials if not trial.is_there(folder)]
    done = len(trials) - len(missing)
    on_progress(done, len(trials))
    for _, group in groupby(missing, key=lambda trial: (trial.prompt, trial.strength)):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            batch = alike[start : start + batch_size]
            drawn = draw(batch)
            boxes = drawn.boxes or [{}] * len(batch)
            for trial, image, found in zip(batch, drawn.images_bhwc, boxes, strict=True):
                if trial.subjects:  # first: a picture that is there is done
                    write_text_atomically(trial.boxes_path(folder), json_text(dict(found)))
                save_picture(trial.path(folder), image)
            done += len(batch)
            on_progress(done, len(trials))


def concept_fingerprint(concept: Concept) -> str:
    """Of all that a concept changes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(concept_tensors(concept).items()):
        content = tensor.detach().cpu().float().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + content.numpy().tobytes())
    return digest.hexdigest()


def _box(values: Any) -> Box:
    """Raises ValueError or TypeError for what is none."""
    left, top, right, bottom = map(float, values)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(f"{values} is no part of a picture")
    return left, top, right, bottom
