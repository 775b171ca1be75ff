"""Two trainings are the same when all that goes into them is."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import DataError
from custom_diffusion.host.diffusers.lending import borrowed_models
from custom_diffusion.trainer.config import SETTINGS, TrainConfig
from custom_diffusion.trainer.data.captioned import CaptionedImage
from custom_diffusion.trainer.data.training_concept import TrainingConcept
from custom_diffusion.trainer.jobs.fingerprint import training_fingerprint
from custom_diffusion.trainer.request import TrainingRequest
from diffusers import StableDiffusionPipeline
from PIL import Image
from support.concepts import random_concept
from support.tiny_models import cat_concept, dog_concept, tiny_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.any_version]

Inputs = dict[str, Any]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, color in enumerate(("red", "blue")):
        Image.new("RGB", (8, 8), color).save(folder / f"{number}.png")
        Image.new("L", (8, 8), 255).save(folder / f"{number}.mask.png")
    return folder


@pytest.fixture
def inputs(pictures: Path) -> Inputs:
    concept = replace(
        cat_concept(1, regularization=1),
        images=(CaptionedImage(pictures / "0.png", "photo of a <new1> cat"),),
    )
    return {"config": TrainConfig(), "concepts": [concept], "pipeline": None, "start": None}


def fingerprint(
    config: TrainConfig,
    concepts: list[TrainingConcept],
    pipeline: StableDiffusionPipeline | None,
    start: Concept | None,
) -> str:
    pipeline = pipeline or tiny_pipeline()
    with borrowed_models(pipeline) as models:
        networks = (pipeline.unet, pipeline.vae)
        request = TrainingRequest(config, concepts, start)
        return training_fingerprint(request, models.text_encoder, networks)


def changed_image(inputs: Inputs, **changes: Any) -> Inputs:
    (concept,) = inputs["concepts"]
    image = replace(concept.images[0], **changes)
    return {**inputs, "concepts": [replace(concept, images=(image,))]}


def changed_concept(inputs: Inputs, **changes: Any) -> Inputs:
    return {**inputs, "concepts": [replace(inputs["concepts"][0], **changes)]}


def changed_pipeline(inputs: Inputs, name: str) -> Inputs:
    """One weight, a little, as another checkpoint or a LoRA would."""
    pipeline = tiny_pipeline()
    part = copy.deepcopy(getattr(pipeline, name))
    with torch.no_grad():
        next(p for n, p in part.named_parameters() if n.endswith("weight") and p.ndim == 2).add_(
            0.1
        )
    pipeline.register_modules(**{name: part})
    return {**inputs, "pipeline": pipeline}


def test_the_same_again_is_the_same(inputs: Inputs, tmp_path: Path) -> None:
    first = fingerprint(**inputs)
    assert fingerprint(**inputs) == first
    moved = tmp_path / "moved.png"
    moved.write_bytes(inputs["concepts"][0].images[0].source.read_bytes())
    assert fingerprint(**changed_image(inputs, source=moved)) == first
    assert fingerprint(**{**inputs, "config": TrainConfig(steps=7)}) == first  # as far as they go
    falling = [TrainConfig(schedule="cosine", steps=steps) for steps in (7, 8)]
    assert len({fingerprint(**{**inputs, "config": config}) for config in falling}) == 2
    unmeasured = TrainConfig(validation_every_steps=7, early_stopping="on", patience_steps=3)
    assert fingerprint(**{**inputs, "config": unmeasured}) == first


def test_what_is_kept_back_makes_another_and_when_it_ends_does_not(inputs: Inputs) -> None:
    def of(**settings: Any) -> str:
        return fingerprint(**{**inputs, "config": TrainConfig(**settings)})

    kept = of(validation_pictures=1)
    assert len({of(), kept, of(validation_pictures=2)}) == 3
    assert of(validation_pictures=1, validation_every_steps=9) != kept
    assert of(validation_pictures=1, early_stopping="on", patience_steps=7) == kept


def test_settings_that_came_later_leave_the_fingerprints_of_old_jobs(inputs: Inputs) -> None:
    """As it was computed before there was validation, and before there were options."""
    config = TrainConfig()
    options = {name for name, one in SETTINGS.items() if one.group == "options"}
    later = ("validation_pictures", "validation_every_steps", "early_stopping", "patience_steps")

    class Before:
        validation_pictures, schedule, caption_lines = 0, "constant", "first"

        def as_json(self) -> dict[str, Any]:
            return {k: v for k, v in config.as_json().items() if k not in (*later, *options)}

    before: Any = Before()
    assert fingerprint(**{**inputs, "config": before}) == fingerprint(**inputs)
    chosen = TrainConfig(seg_mix=0.3)
    assert fingerprint(**{**inputs, "config": chosen}) != fingerprint(**inputs)


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs, folder: {**inputs, "config": TrainConfig(seed=1)},
        lambda inputs, folder: {**inputs, "config": TrainConfig(method="low-rank")},
        lambda inputs, folder: changed_image(inputs, source=folder / "1.png"),
        lambda inputs, folder: changed_image(inputs, caption="a drawing of a <new1> cat"),
        lambda inputs, folder: changed_image(inputs, mask=folder / "0.mask.png"),
        lambda inputs, folder: changed_image(inputs, repeats=2),
        lambda inputs, folder: changed_image(inputs, source=Image.new("RGB", (8, 8), "red")),
        lambda inputs, folder: changed_concept(inputs, class_noun="kitten"),
        lambda inputs, folder: changed_concept(inputs, initializer="tabby"),
        lambda inputs, folder: changed_concept(inputs, regularization=()),
        lambda inputs, folder: {**inputs, "concepts": [*inputs["concepts"], dog_concept()]},
        lambda inputs, folder: {**inputs, "start": random_concept()},
        lambda inputs, folder: changed_pipeline(inputs, "unet"),
        lambda inputs, folder: changed_pipeline(inputs, "vae"),
        lambda inputs, folder: changed_pipeline(inputs, "text_encoder"),
    ],
)
def test_whatever_is_another_makes_another(
    inputs: Inputs, pictures: Path, change: Callable[[Inputs, Path], Inputs]
) -> None:
    assert fingerprint(**change(inputs, pictures)) != fingerprint(**inputs)


def test_a_picture_that_is_gone_is_named(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png cannot be read .* Put it back"):
        fingerprint(**changed_image(inputs, source=tmp_path / "gone.png"))


@pytest.mark.timeout(60)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in this system's folders")
def test_a_picture_that_is_a_pipe_is_named(inputs: Inputs, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png cannot be read \(it is a pipe, not a file\)"):
        fingerprint(**changed_image(inputs, source=tmp_path / "pipe.png"))
