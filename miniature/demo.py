"""The whole way on the miniature: teach two concepts, merge both, draw with the result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from ..concept.atomic import write_atomically
from ..concept.concept import Concept
from ..concept.file import read_concept, write_concept
from ..host.diffusers import borrowed_models, sample, text_encoder
from ..merge.compose import merge_concepts
from ..trainer.data import instance_caption, load_folder
from ..trainer.loop import Event, StepDone, train
from ..trainer.prepare import prepare
from .laboratory import CONFIG, GUIDANCE, SAMPLING_STEPS, Subject, pair_of_subjects, world_captions
from .model import PICTURE_EDGE, miniature_pipeline
from .world import class_caption

log = logging.getLogger("custom_diffusion")

PAIR = 7
_COLUMNS, _TILE, _GAP, _LABEL = 6, 112, 6, 330


def run_demo(folder: Path) -> Path:
    """Leaves two concepts, the merged one and a picture of all in `folder`; returns the picture."""
    pipeline = miniature_pipeline()
    pair = pair_of_subjects(PAIR, seed=0)
    concepts = []
    for subject in pair:
        path = write_concept(
            _teach(pipeline, subject, folder), folder / f"{subject.look.shape}.safetensors"
        )
        log.info("saved %s", path)
        concepts.append(read_concept(path))

    with _bar("merging", 100) as advance:
        merged, report = merge_concepts(
            concepts,
            text_encoder(pipeline),
            captions=world_captions(),
            on_progress=lambda part: advance(int(100 * part)),
        )
    path = write_concept(merged, folder / "both.safetensors")
    log.info("%s\nsaved %s", report.text(), path)

    sheet = _sheet(pipeline, pair, concepts, merged)
    picture = folder / "demo.png"
    write_atomically(picture, lambda temporary: sheet.save(temporary, "PNG"))
    log.info("saved %s", picture)
    return picture


def _teach(pipeline: Any, subject: Subject, folder: Path) -> Concept:
    """From pictures in a folder, as a user's would be."""
    pictures = folder / subject.look.shape
    pictures.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(subject.training.images):
        image.open().save(pictures / f"{index}.png")
    caption = instance_caption(subject.token, subject.look.shape)
    concept = replace(subject.training, images=load_folder(pictures, caption))
    with borrowed_models(pipeline) as models:
        bank = prepare(concept, CONFIG, models.latent_encoder, models.text_encoder)
        with _bar(f"teaching {subject.words}", CONFIG.steps) as advance:

            def show(event: Event) -> None:
                if isinstance(event, StepDone):
                    advance(event.step)

            return train(
                CONFIG, [concept], [bank], models.denoiser, models.text_encoder, on_event=show
            )


def _sheet(
    pipeline: Any, pair: tuple[Subject, Subject], concepts: list[Concept], merged: Concept
) -> Image.Image:
    """What was given, and what the model draws before and afterwards."""
    one, two = pair
    classes = [class_caption(subject.look.shape) for subject in pair]
    together = f"photo of a {one.words} and a {two.words}"
    half = _COLUMNS // 2
    drawn: list[tuple[str, str, list[str], Concept | None]] = [
        ("The model before", " | ".join(classes), [c for c in classes for _ in range(half)], None),
        *(
            (
                f"Concept {number} alone",
                f"photo of a {subject.words}",
                [f"photo of a {subject.words}"] * _COLUMNS,
                concept,
            )
            for number, subject, concept in zip((1, 2), pair, concepts, strict=True)
        ),
        ("Both, merged in closed form", together, [together] * _COLUMNS, merged),
        (
            "The classes, after the merge",
            " | ".join(classes),
            [c for c in classes for _ in range(half)],
            merged,
        ),
    ]
    rows = [
        (
            f"Given: pictures of {subject.words}",
            f"{_COLUMNS} of {len(subject.training.images)}",
            [image.open() for image in subject.training.images[:_COLUMNS]],
        )
        for subject in pair
    ]
    with _bar("drawing", len(drawn)) as advance:
        for number, (title, words, prompts, concept) in enumerate(drawn, 1):
            images_bhwc = sample(
                pipeline,
                prompts,
                concept,
                resolution=PICTURE_EDGE,
                steps=SAMPLING_STEPS,
                guidance=GUIDANCE,
            )
            rows.append((title, words, [_to_image(image) for image in images_bhwc]))
            advance(number)
    return _lay_out(rows)


def _lay_out(rows: list[tuple[str, str, list[Image.Image]]]) -> Image.Image:
    step = _TILE + _GAP
    sheet = Image.new("RGB", (_LABEL + _COLUMNS * step + _GAP, len(rows) * step + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(17), ImageFont.load_default(13)
    for number, (title, words, images) in enumerate(rows):
        top = _GAP + number * step
        pen.text((2 * _GAP, top + _TILE / 2 - 22), title, "black", large)
        pen.text((2 * _GAP, top + _TILE / 2 + 4), words, "#555555", small)
        for column, image in enumerate(images):
            sheet.paste(image.resize((_TILE, _TILE)), (_LABEL + column * step, top))
    return sheet


def _to_image(image_hwc: Tensor) -> Image.Image:
    return Image.fromarray((image_hwc * 255).round().to(torch.uint8).numpy())


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    with tqdm(total=total, desc=title) as bar:

        def advance(done: int) -> None:
            bar.update(done - bar.n)

        yield advance
