"""The whole way on the miniature: teach two concepts, merge both, draw with the result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..composition.routing import Route
from ..concept.atomic import write_atomically
from ..concept.concept import Concept
from ..concept.file import read_concept, write_concept
from ..host.diffusers.lending import borrowed_models, text_encoder
from ..host.diffusers.sampling import sample
from ..merge.merging import merge_concepts
from ..merge.projection import project_on_own_words
from ..pictures.sheet import Row, lay_out
from ..pictures.tensors import to_picture
from ..trainer.data.folders import load_folder
from ..trainer.data.training_concept import instance_caption
from ..trainer.events import Event, StepDone
from ..trainer.request import TrainingRequest
from ..trainer.teach import teach
from .laboratory import Subject, pair_of_subjects
from .model import CONFIG, GUIDANCE, PICTURE_EDGE, SAMPLING_STEPS, miniature_pipeline
from .world import class_caption, world_captions

log = logging.getLogger("custom_diffusion")

PAIR = 50
_COLUMNS = 6


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
        image.open().image.save(pictures / f"{index}.png")
    caption = instance_caption(subject.token, subject.look.shape)
    concept = replace(subject.training, images=load_folder(pictures, caption), regularization=())
    with borrowed_models(pipeline) as models:
        with _bar(f"teaching {subject.words}", CONFIG.steps) as advance:

            def show(event: Event) -> None:
                if isinstance(event, StepDone):
                    advance(event.step)

            taught = teach(
                TrainingRequest(CONFIG, [concept]),
                models.denoiser,
                models.text_encoder,
                models.latent_encoder,
                show,
            )
        return project_on_own_words(taught, models.text_encoder, captions=world_captions())[0]


def _sheet(
    pipeline: Any, pair: tuple[Subject, Subject], concepts: list[Concept], merged: Concept
) -> Image.Image:
    """What was given, and what the model draws before and afterwards."""
    one, two = pair
    alone = [f"photo of a {subject.words}" for subject in pair]
    together = f"photo of a {one.words} and a {two.words}"
    classes = [class_caption(subject.look.shape) for subject in pair]
    drawn: list[tuple[str, Sequence[str], Concept | None, Sequence[Concept]]] = [
        ("The model before", classes, None, []),
        ("Concept 1 alone", alone[:1], concepts[0], []),
        ("Concept 2 alone", alone[1:], concepts[1], []),
        ("Both, each at its own words", [together], None, concepts),
        ("Both, merged into one file", [together], merged, []),
        ("The classes, after the merge", classes, merged, []),
    ]
    rows = [
        Row(
            f"Given: {len(subject.training.images)} pictures",
            f"of {subject.words}",
            [image.open().image for image in subject.training.images[:_COLUMNS]],
        )
        for subject in pair
    ]
    with _bar("drawing", len(drawn)) as advance:
        for number, (title, prompts, concept, routed) in enumerate(drawn, 1):
            images_bhwc = sample(
                pipeline,
                [prompt for prompt in prompts for _ in range(_COLUMNS // len(prompts))],
                concept,
                routes=[Route(one) for one in routed],
                resolution=PICTURE_EDGE,
                steps=SAMPLING_STEPS,
                guidance=GUIDANCE,
            )
            rows.append(Row(title, " | ".join(prompts), [*map(to_picture, images_bhwc)]))
            advance(number)
    return lay_out(rows)


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    with tqdm(total=total, desc=title) as bar:

        def advance(done: int) -> None:
            bar.update(done - bar.n)

        yield advance
