"""Teaching is preparing each concept and training, whoever does it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from custom_diffusion.concept.errors import IncompatibleModelError
from custom_diffusion.concept.file import concept_tensors
from custom_diffusion.host.diffusers.lending import borrowed_models
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.events import Event, StepDone
from custom_diffusion.trainer.loop import train
from custom_diffusion.trainer.prepare import prepare
from custom_diffusion.trainer.request import TrainingRequest
from custom_diffusion.trainer.teach import prepared, teach
from support.made_concepts import concept_for
from support.tiny_models import RESOLUTION, cat_concept, dog_concept, tiny_pipeline
from torch import Tensor

CONFIG = TrainConfig(steps=2, batch_size=2, resolution=RESOLUTION, preview_every_steps=0)
CONCEPTS = [cat_concept(2, regularization=0), dog_concept()]


class UnusedEncoder:
    def moments(self, image_chw: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("pictures were encoded before the request was judged")


def test_it_is_what_each_part_does_by_itself() -> None:
    with borrowed_models(tiny_pipeline()) as models:
        parts = models.denoiser, models.text_encoder, models.latent_encoder
        events: list[Event] = []
        taught = teach(TrainingRequest(CONFIG, CONCEPTS), *parts, events.append)
        banks = [
            prepare(one, CONFIG, models.latent_encoder, models.text_encoder) for one in CONCEPTS
        ]
        wanted = train(CONFIG, CONCEPTS, banks, models.denoiser, models.text_encoder)
    assert [event.step for event in events if isinstance(event, StepDone)] == [1, 2]
    mine, theirs = concept_tensors(taught), concept_tensors(wanted)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_its_progress_is_that_of_all_concepts() -> None:
    shown: list[tuple[int, int]] = []
    request = TrainingRequest(CONFIG, CONCEPTS)
    with borrowed_models(tiny_pipeline()) as models:
        prepared(
            request,
            models.denoiser,
            models.text_encoder,
            models.latent_encoder,
            lambda *now: shown.append(now),
        )
    total = shown[-1][1]
    assert shown == [(done, total) for done in range(1, total + 1)]


def test_a_concept_that_cannot_be_gone_on_from_costs_no_time() -> None:
    pipeline = tiny_pipeline()
    start = replace(concept_for(pipeline, "<new1>", "cat", 0), base_hash="another")
    request = TrainingRequest(CONFIG, CONCEPTS, start)
    with (
        borrowed_models(pipeline) as models,
        pytest.raises(IncompatibleModelError, match="trained on another checkpoint"),
    ):
        teach(request, models.denoiser, models.text_encoder, UnusedEncoder())
