"""Evaluating a concept with ComfyUI's loaded models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ...composition.routing import Route
from ...concept.atomic import write_text_atomically
from ...concept.concept import Concept
from ...concept.errors import ConfigError
from ...concept.naming import safe_file_name
from ...concept.plain import json_text
from ...evaluation.features import Judge
from ...evaluation.prompts import Taught, Together, check_prompts, names_of, read_prompts
from ...evaluation.report import alignment_plot, as_json, sheet, table, verdict
from ...evaluation.scores import measure
from ...evaluation.trials import Plan, concept_fingerprint, draw_trials
from ...pictures.kept import settings_hash
from ...pictures.tensors import to_tensor
from ...trainer.data.training_concept import TrainingConcept
from .apply import check_models
from .drawing import Sampling, drawing_models
from .judging import NO_JUDGE, judge_of
from .paths import MODEL_FOLDER, NO_FOLDER
from .references import Pictures, reference_sets
from .routing import check_routes
from .trial_pictures import drawing_of

APPLIED, ROUTED = "in the weights", "routed"
"""How concepts are used: as Apply Concept does, or as Route Concepts"""
_ON_SHEET = 8
_CLASS_COUNT = 50
"""Pictures of the bare class to draw, where there are real ones to compare them with"""


@dataclass(frozen=True)
class Shown:
    """What an evaluation shows on its node and hands on."""

    lines: list[str]
    warnings: list[str]
    table: list[tuple[str, ...]]
    plot: Tensor
    sheet: Tensor
    folder: Path


def evaluate(
    model: Any,
    clip: Any,
    vae: Any,
    concepts: Sequence[Concept],
    sampling: Sampling,
    *,
    routed: bool,
    subjects: Sequence[TrainingConcept],
    references: Tensor | None,
    reference_folder: str,
    class_folder: str,
    prompts: str,
    strengths: str,
    seed: int,
    pictures_per_prompt: int,
    batch_size: int,
    clip_vision: Any = None,
    judge_clip: Any = None,
) -> Shown:
    """Draws what is missing, then judges all of it. Pictures are kept in a folder that is named
    after all they depend on: interrupting keeps them, and the same inputs go on from there.

    `subjects` are references of each trigger word, in place of those of the first.
    """
    taught = _taught(model, clip, concepts, routed)
    own = reference_sets(taught, references, reference_folder, subjects)
    real = Pictures.of(None, class_folder) if class_folder != NO_FOLDER else None
    plan = Plan(
        taught,
        read_prompts(prompts),
        tuple(range(seed, seed + pictures_per_prompt)),
        read_strengths(strengths),
        _CLASS_COUNT if real and clip_vision is not None else 0,
        tuple(own) if len(own) > 1 and clip_vision is not None else (),
    )
    example = next(iter(own.values())).open(0)
    judge = None if clip_vision is None else judge_of(clip_vision, judge_clip, clip, example)
    settings = {
        **drawing_models(model, clip, vae),
        "concept": " ".join(map(concept_fingerprint, concepts)),
        **vars(sampling),
        **({"use": "routed"} if routed else {}),
    }
    name = safe_file_name(" and ".join(names_of(taught)))
    folder = evaluation_folder() / f"{name}-{settings_hash(settings)}"
    total = len(plan.everything())
    steps = comfy.utils.ProgressBar(2 * total)
    draw_trials(
        folder,
        settings,
        plan.everything(),
        drawing_of(model, clip, vae, concepts, routed, sampling),
        batch_size=batch_size,
        on_progress=lambda done, _: steps.update_absolute(done, 2 * total),
    )

    def one_judged(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        steps.update_absolute(total + done, 2 * total)

    return _shown(plan, folder, judge, own, real, one_judged)


def _taught(model: Any, clip: Any, concepts: Sequence[Concept], routed: bool) -> Taught:
    """Checks whether the concepts can be used on these models, and so."""
    if routed:
        check_routes(model, clip, [Route(concept) for concept in concepts])
    elif len(concepts) > 1:
        raise ConfigError(
            f"{len(concepts)} concepts were given. Set use to {ROUTED!r} to draw them together, "
            f"each at its own words; or merge them with Concept Merge, and evaluate the merge."
        )
    else:
        check_models(model, clip, concepts[0])
    return Together(tuple(concepts)) if len(concepts) > 1 else concepts[0]


def _shown(
    plan: Plan,
    folder: Path,
    judge: Judge | None,
    own: Mapping[str, Pictures],
    real: Pictures | None,
    on_progress: Callable[[int, int], None],
) -> Shown:
    warnings = check_prompts(plan.prompts, plan.concept)
    if without := [name for name in names_of(plan.concept) if name not in own]:
        warnings.append(f"Without references, so not compared: {', '.join(without)}.")
    first = [one for pictures in own.values() for one in pictures.first(_ON_SHEET // len(own))]
    if judge is None:
        pictures = to_tensor(sheet(plan, folder, first))[None]
        return Shown([], [*warnings, NO_JUDGE], [], torch.zeros(1, 64, 64, 3), pictures, folder)
    found = measure(
        plan,
        folder,
        judge,
        {name: pictures.each() for name, pictures in own.items()},
        real.each() if real else (),
        on_progress,
        {name: pictures.each_subject() for name, pictures in own.items()},
    )
    write_text_atomically(folder / "scores.json", json_text(as_json(found)))
    return Shown(
        verdict(found),
        [*warnings, *found.remarks],
        table(found),
        to_tensor(alignment_plot(found))[None],
        to_tensor(sheet(plan, folder, first, found))[None],
        folder,
    )


def evaluation_folder() -> Path:
    """Where the pictures of evaluations lie."""
    return Path(folder_paths.get_output_directory()) / MODEL_FOLDER / "evaluation"


def read_strengths(text: str) -> tuple[float, ...]:
    """`0.6, 0.8 1` → numbers. Raises ConfigError."""
    try:
        return tuple(float(word) for word in text.replace(",", " ").split())
    except ValueError as error:
        raise ConfigError(
            f"The strengths {text[:100]!r} are no numbers. Write them like 0.6, 0.8, 1."
        ) from error
