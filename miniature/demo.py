"""The main job from end to end: draw two things, teach each, merge both, draw with the result."""

from __future__ import annotations

import logging
import random
from pathlib import Path

from PIL import Image, ImageDraw

from ..concept.concept import Concept
from ..concept.file import read_concept, write_concept
from ..host.diffusers import borrowed_models, sample, text_encoder
from ..merge.compose import merge_concepts
from ..trainer.config import TrainConfig
from ..trainer.data import TrainingConcept, instance_caption, load_folder
from ..trainer.loop import Event, StepDone, train
from ..trainer.prepare import prepare
from .random_model import random_pipeline

log = logging.getLogger("custom_diffusion")

THINGS = {"<new1>": "ball", "<new2>": "box"}
_PICTURE = 128
_CONFIG = TrainConfig(
    steps=40,
    batch_size=4,
    learning_rate=1e-3,
    resolution=64,
    views_per_image=4,
    preview_every_steps=0,
)


def run_demo(folder: Path) -> Path:
    """Leaves two concepts, the merged one and a picture of all in `folder`; returns the picture."""
    pipeline = random_pipeline()
    concepts = []
    for token, noun in THINGS.items():
        pictures = folder / noun
        _draw_pictures(pictures, noun)
        concept = _teach(pipeline, token, noun, pictures)
        path = write_concept(concept, folder / f"{noun}.safetensors")
        log.info("%s %s: saved %s", token, noun, path)
        concepts.append(read_concept(path))

    merged, report = merge_concepts(concepts, text_encoder(pipeline))
    path = write_concept(merged, folder / "both.safetensors")
    log.info("%s\nsaved %s", report.text(), path)

    picture = folder / "demo.png"
    _sheet(pipeline, concepts, merged).save(picture)
    log.info("saved %s (the model's weights are random, so it draws noise)", picture)
    return picture


def _teach(pipeline: object, token: str, noun: str, pictures: Path) -> Concept:
    training_concept = TrainingConcept(
        images=load_folder(pictures, instance_caption(token, noun)), class_noun=noun, token=token
    )
    with borrowed_models(pipeline) as models:
        bank = prepare(training_concept, _CONFIG, models.latent_encoder, models.text_encoder)
        return train(
            _CONFIG,
            training_concept,
            bank,
            models.denoiser,
            models.text_encoder,
            on_event=_show,
        )


def _show(event: Event) -> None:
    if isinstance(event, StepDone) and event.step % 10 == 0:
        log.info("  step %d of %d, loss %.3f", event.step, _CONFIG.steps, event.loss)


def _draw_pictures(folder: Path, noun: str, count: int = 4) -> None:
    """A striped ball or a spotted box on plain backgrounds, in place of photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(noun)
    for index in range(count):
        image = Image.new(
            "RGB", (_PICTURE, _PICTURE), tuple(rng.randrange(140, 256) for _ in range(3))
        )
        draw = ImageDraw.Draw(image)
        x, y, size = rng.randrange(10, 40), rng.randrange(10, 40), rng.randrange(50, 80)
        if noun == "ball":
            draw.ellipse((x, y, x + size, y + size), fill=(220, 90, 30))
            draw.rectangle((x + 4, y + size // 3, x + size - 4, y + size // 2), fill=(40, 60, 160))
        else:
            draw.rectangle((x, y, x + size, y + size), fill=(40, 150, 110))
            draw.ellipse((x + size // 4, y + size // 4, x + size // 2, y + size // 2), fill="white")
        image.save(folder / f"{index}.png")


def _sheet(pipeline: object, concepts: list[Concept], merged: Concept) -> Image.Image:
    """The same noise drawn by the base model, with each concept, and with both."""
    names = [f"{token} {noun}" for token, noun in THINGS.items()]
    rows: list[tuple[str, Concept | None]] = [
        *((noun, None) for noun in THINGS.values()),
        *zip(names, concepts, strict=True),
        (" and a ".join(names), merged),
    ]
    tiles = [
        sample(pipeline, f"photo of a {words}", concept, resolution=64, steps=10)
        for words, concept in rows
    ]
    tile, gap = 128, 8
    sheet = Image.new("RGB", ((tile + gap) * len(tiles) + gap, tile + 3 * gap + 28), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, (words, _)) in enumerate(zip(tiles, rows, strict=True)):
        left = gap + index * (tile + gap)
        sheet.paste(picture.resize((tile, tile)), (left, gap))
        draw.text((left, tile + 2 * gap), words.replace(" and a ", "\nand a "), fill="black")
    return sheet
