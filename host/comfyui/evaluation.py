"""Evaluating a concept with ComfyUI's loaded models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import folder_paths
import torch
from PIL import Image
from torch import Tensor

from ...concept.atomic import write_text_atomically
from ...concept.concept import Concept
from ...concept.errors import ConfigError, DataError, IncompatibleModelError
from ...concept.naming import safe_file_name
from ...concept.plain import json_text
from ...evaluation.features import WORD, Judge, picture_features
from ...evaluation.prompts import check_prompts, names_of, read_prompts
from ...evaluation.report import alignment_plot, as_json, sheet, table, verdict
from ...evaluation.scores import measure
from ...evaluation.trials import Plan, Trial, concept_fingerprint, draw_trials
from ...pictures.kept import settings_hash
from ...pictures.tensors import to_picture, to_tensor
from ...trainer.data.folders import load_folder
from .apply import apply_concept, check_models
from .drawing import Sampling, conditioning, drawing_models
from .models.text import encoder_names
from .paths import MODEL_FOLDER, NO_FOLDER, input_folder

_ON_SHEET = 8
_CLASS_COUNT = 50
"""Pictures of the bare class to draw, where there are real ones to compare them with"""
NO_JUDGE = (
    "No feature model is connected, so nothing is measured: look at the sheet. For figures, put a "
    "CLIP vision model (clip_vision_l.safetensors of openai/clip-vit-large-patch14, for one) into "
    "models/clip_vision, load it with Load CLIP Vision, and connect it to clip_vision. Nothing is "
    "downloaded."
)
NO_TEXT = (
    "Text alignment is not measured: this CLIP has no projection into the space of clip_vision. "
    "Put the whole text half of the same CLIP (clip_l.safetensors for ViT-L/14) into "
    "models/text_encoders, load it with Load CLIP, and connect it to judge_clip."
)


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
    concept: Concept,
    sampling: Sampling,
    *,
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
    """
    check_models(model, clip, concept)
    own = _Pictures.of(references, reference_folder)
    real = _Pictures.of(None, class_folder) if class_folder != NO_FOLDER else None
    plan = Plan(
        concept,
        read_prompts(prompts),
        tuple(range(seed, seed + pictures_per_prompt)),
        read_strengths(strengths),
        _CLASS_COUNT if real and clip_vision is not None else 0,
    )
    judge = None if clip_vision is None else _judge(clip_vision, judge_clip, clip, own.open(0))
    settings = {
        **drawing_models(model, clip, vae),
        "concept": concept_fingerprint(concept),
        **vars(sampling),
    }
    name = safe_file_name(" and ".join(names_of(concept)))
    folder = evaluation_folder() / f"{name}-{settings_hash(settings)}"
    total = len(plan.everything())
    steps = comfy.utils.ProgressBar(2 * total)
    draw_trials(
        folder,
        settings,
        plan.everything(),
        _drawing(model, clip, vae, concept, sampling),
        batch_size=batch_size,
        on_progress=lambda done, _: steps.update_absolute(done, 2 * total),
    )

    def one_judged(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        steps.update_absolute(total + done, 2 * total)

    return _shown(plan, folder, judge, own, real, one_judged)


def _shown(
    plan: Plan,
    folder: Path,
    judge: Judge | None,
    own: _Pictures,
    real: _Pictures | None,
    on_progress: Callable[[int, int], None],
) -> Shown:
    warnings = check_prompts(plan.prompts, plan.concept)
    first = own.first(_ON_SHEET)
    if judge is None:
        pictures = to_tensor(sheet(plan, folder, first))[None]
        return Shown([], [*warnings, NO_JUDGE], [], torch.zeros(1, 64, 64, 3), pictures, folder)
    references = {names_of(plan.concept)[0]: own.each()}
    found = measure(plan, folder, judge, references, real.each() if real else (), on_progress)
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


@dataclass(frozen=True)
class _Pictures:
    """Pictures that are opened one by one: of a folder of `input/`, or in memory already."""

    count: int
    open: Callable[[int], Image.Image]

    @staticmethod
    def of(images: Tensor | None, folder: str) -> _Pictures:
        if images is not None and folder != NO_FOLDER:
            raise DataError(
                f"Both reference pictures and the folder {folder!r} were given. Disconnect the "
                f"pictures, or set the folder to {NO_FOLDER!r}."
            )
        if images is not None:
            return _Pictures(len(images), lambda n: to_picture(images[n][..., :3]))
        if folder == NO_FOLDER:
            raise DataError(
                "There are no reference pictures to compare with. Connect pictures of the concept, "
                "best some it was not trained on, or choose their folder."
            )
        loaded = load_folder(input_folder(folder), "")
        return _Pictures(len(loaded), lambda n: loaded[n].open().image)

    def each(self) -> Iterator[Image.Image]:
        for number in range(self.count):
            comfy.model_management.throw_exception_if_processing_interrupted()
            yield self.open(number)

    def first(self, most: int) -> list[Image.Image]:
        return [self.open(number) for number in range(min(most, self.count))]


def _drawing(
    model: Any, clip: Any, vae: Any, concept: Concept, sampling: Sampling
) -> Callable[[Sequence[Trial]], Tensor]:
    @cache
    def applied(strength: float) -> tuple[Any, Any]:
        return apply_concept(model, clip, concept, strength)

    def draw(trials: Sequence[Trial]) -> Tensor:
        drawing, reading = applied(trials[0].strength)
        noise = torch.cat(
            [comfy.sample.prepare_noise(sampling.empty(1), trial.seed) for trial in trials]
        )
        positive, negative = (conditioning(reading, text) for text in (trials[0].prompt, ""))
        return sampling.draw(drawing, vae, positive, negative, noise, trials[0].seed)

    return draw


def _judge(clip_vision: Any, judge_clip: Any, clip: Any, example: Image.Image) -> Judge:
    """A CLIP_VISION with the text half that was chosen for it, or with the model's own CLIP where
    that has a projection of the same width.
    """
    reader = clip if judge_clip is None else judge_clip

    def image_features(images_bhwc: Tensor) -> Tensor:
        found: Tensor = clip_vision.encode_image(images_bhwc)["image_embeds"]
        return found

    def text_features(texts: Sequence[str]) -> Tensor:
        pooled = [
            reader.encode_from_tokens(reader.tokenize(text), return_pooled=True)[1]
            for text in texts
        ]
        return torch.cat(pooled)

    blank = Judge("CLIP vision", image_features, remarks=(NO_TEXT,))
    width = projection_width(reader)
    if judge_clip is None and width != picture_features(blank, [example]).shape[1]:
        return blank
    if not width:
        raise IncompatibleModelError(
            f"The CLIP on judge_clip cannot be compared with pictures. {NO_TEXT}"
        )
    words = _words(reader)
    judge = Judge("CLIP vision and its text half", image_features, text_features, words[-1])
    return judge.compared_with(_words(clip))


def projection_width(clip: Any) -> int:
    """Of the space in which a CLIP places texts among pictures; 0 where it has no projection: then
    ComfyUI leaves there what the memory held, no numbers, noughts, or some of an untrained size.
    """
    last = getattr(clip.cond_stage_model, encoder_names(clip)[-1])
    weight = last.transformer.text_projection.weight.detach().float()
    size = float(weight.square().mean().sqrt()) * len(weight) ** 0.5
    return len(weight) if weight.isfinite().all() and 0.1 < size < 10 else 0


def _words(clip: Any) -> list[Tensor]:
    """How its text encoders embed `WORD`; the last one is what a pooled feature comes from."""
    encoders = [getattr(clip.cond_stage_model, name) for name in encoder_names(clip)]
    return [
        one.transformer.get_input_embeddings().weight[WORD].detach().float().cpu()
        for one in encoders
    ]
