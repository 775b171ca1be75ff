"""Drawing a job's steps beside each other, each with several strengths and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, TypeVar

import comfy.sample
import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from ....concept.concept import Concept
from ....concept.errors import ConfigError, JobError
from ....concept.file import read_concept
from ....merge.projection import project_on_own_words
from ....pictures.sheet import Row, lay_out
from ....pictures.tensors import to_picture, to_tensor
from ....trainer.jobs.comparison import Comparison
from ....trainer.jobs.job import Job
from ....trainer.jobs.records import MOST_CELLS, MOST_STEPS, ComparisonPlan
from ..apply import apply_concept, check_models
from ..drawing import Sampling, conditioning
from ..models.text import text_encoder
from ..paths import cache_folder
from .service import chosen_job, nothing_learnt

_TILE, _LABEL = 192, 150
_LARGEST_STRENGTH = 4.0
_Number = TypeVar("_Number", int, float)


def compare_steps(
    model: Any,
    clip: Any,
    vae: Any,
    *,
    job_id: str,
    prompt: str,
    negative: str,
    steps: str,
    strengths: str,
    seeds: str,
    sampling: Sampling,
) -> tuple[Tensor, Tensor, str]:
    """A sheet (1, h, w, 3), the pictures of it (n, h, w, 3), and what it shows in words.

    Its pictures are in the job's folder as soon as they are drawn. Raises ConfigError for numbers
    that are none, JobError where the job has kept none of the steps, or is deleted meanwhile.
    """
    job = chosen_job(job_id)
    of = _kept_steps(job, _numbers("steps", steps, int, 1, MOST_STEPS) if steps.strip() else [])
    at = _numbers("strengths", strengths, float, -_LARGEST_STRENGTH, _LARGEST_STRENGTH)
    noises = _numbers("seeds", seeds, int, 0, 2**64 - 1)
    _check_count(len(of), len(at), len(noises))
    first = _concept_of(job, of[0])
    check_models(model, clip, first)
    prompt = prompt.strip() or (first.constraint_prompts or ("",))[-1]
    plan = ComparisonPlan(prompt, tuple(of), tuple(at), tuple(noises))
    comparison = Comparison.begin(job.folder, plan)
    for step in plan.steps:
        # Small, and alike in whatever loads it: as the training saves its own result.
        comparison.write_concept(_as_saved(_concept_of(job, step), clip), step)
    pictures = _drawn(comparison, model, clip, vae, negative, sampling)
    sheet = _sheet(plan, pictures, job.validation())
    text = f"{job.id}, steps {', '.join(map(str, plan.steps))}: {prompt}"
    return to_tensor(sheet)[None], torch.stack([*map(to_tensor, pictures)]), text


def _check_count(steps: int, strengths: int, seeds: int) -> None:
    if (count := steps * strengths * seeds) > MOST_CELLS:
        raise ConfigError(
            f"{steps} steps with {strengths} strengths and {seeds} seeds are {count} pictures; a "
            f"sheet has {MOST_CELLS} at most. Name fewer."
        )


def _kept_steps(job: Job, wanted: Sequence[int]) -> list[int]:
    there = list(job.folder.concepts())
    if not there:
        raise nothing_learnt(job)
    missing = [step for step in wanted if step not in there]
    if missing:
        raise JobError(
            f"The training job {job.id} has not kept step {missing[0]}; it has "
            f"{', '.join(map(str, there))}. Choose of these, or raise keep_best to keep more."
        )
    return sorted(wanted) or there


def _concept_of(job: Job, step: int) -> Concept:
    path = job.folder.concepts().get(step)
    if path is None or not path.is_file():
        gone = "was deleted" if not job.folder.is_there() else f"has dropped step {step}"
        raise JobError(
            f"The training job {job.id} {gone} while its steps were compared. Compare again, or "
            f"pause the training first and raise keep_best."
        )
    return read_concept(path)


def _as_saved(concept: Concept, clip: Any) -> Concept:
    if concept.scope != "own words":
        return concept
    return project_on_own_words(concept, text_encoder(clip), cache_folder=cache_folder())[0]


def _drawn(
    comparison: Comparison, model: Any, clip: Any, vae: Any, negative: str, sampling: Sampling
) -> list[Image.Image]:
    """All pictures, in the order of their numbers; with progress and previews on the node."""
    plan = comparison.plan
    pictures: list[Image.Image] = []
    progress = comfy.utils.ProgressBar(len(plan))
    for step, strength in product(plan.steps, plan.strengths):
        applied, knowing = apply_concept(model, clip, comparison.concept(step), strength)
        positive, other = (conditioning(knowing, text) for text in (plan.prompt, negative))
        for seed in plan.seeds:
            noise = comfy.sample.prepare_noise(sampling.empty(1), seed)
            picture = to_picture(sampling.draw(applied, vae, positive, other, noise, seed)[0])
            comparison.write_picture(len(pictures), picture)
            pictures.append(picture)
            progress.update_absolute(len(pictures), len(plan), ("JPEG", picture, None))
    return pictures


def _sheet(
    plan: ComparisonPlan, pictures: Sequence[Image.Image], validation: dict[int, float]
) -> Image.Image:
    columns = [f"strength {s:g}, seed {seed}" for s, seed in product(plan.strengths, plan.seeds)]
    rows = []
    for row, step in enumerate(plan.steps):
        words = f"validation {validation[step]:.4g}" if step in validation else ""
        of_step = pictures[row * len(columns) : (row + 1) * len(columns)]
        rows.append(Row(f"step {step}", words, of_step, columns))
    return lay_out(rows, _TILE, _LABEL)


def _numbers(
    name: str, text: str, kind: Callable[[str], _Number], least: _Number, most: _Number
) -> list[_Number]:
    """Raises ConfigError unless the text is numbers with commas or spaces between them."""
    try:
        numbers = list(dict.fromkeys(kind(word) for word in text.replace(",", " ").split()))
    except ValueError:
        numbers = []
    if not numbers or not all(least <= number <= most for number in numbers):
        raise ConfigError(
            f"{name}={text[:100]!r} are no numbers from {least:g} to {most:g}. Write them with "
            f"commas between, such as 1 or 0.5, 1."
        )
    return numbers
