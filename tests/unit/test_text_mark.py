"""A concept remembers the text encoder that it was made with, and the layer of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.file import read_concept, write_concept
from custom_diffusion.concept.fit import TEXT_MARK, text_remark
from custom_diffusion.concept.text import text_mark
from custom_diffusion.host.clip.text_encoder import ClipTextEncoder
from custom_diffusion.host.diffusers.lending import DiffusersModels, text_encoder
from custom_diffusion.merge.merging import merge_concepts
from custom_diffusion.merge.projection import project_on_own_words
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.loop import train
from diffusers import StableDiffusionPipeline
from support.tiny_models import RESOLUTION, cat_concept, dog_concept, random_bank, tiny_pipeline

CAPTIONS = [f"a {noun} in a {place}" for noun in ("cat", "dog") for place in ("box", "lake", "car")]


@pytest.fixture(scope="module")
def concepts(pipeline: StableDiffusionPipeline) -> list[Concept]:
    from custom_diffusion.host.diffusers.lending import borrowed_models

    settings = TrainConfig(
        steps=1, batch_size=2, resolution=RESOLUTION, preview_every_steps=0, gradient_cut="start"
    )

    def taught(models: DiffusersModels, one: Any) -> Concept:
        return train(settings, [one], [random_bank(one)], models.denoiser, models.text_encoder)

    with borrowed_models(pipeline) as models:
        return [taught(models, one) for one in (cat_concept(), dog_concept())]


def skipping(pipeline: StableDiffusionPipeline, layers: int) -> ClipTextEncoder:
    tokenizer = pipeline.tokenizer
    return ClipTextEncoder(
        "clip_l",
        pipeline.text_encoder,
        tokenizer,
        pad_id=tokenizer.pad_token_id,
        hidden_layer=-1 - layers,
    )


def test_whatever_was_made_remembers(
    pipeline: StableDiffusionPipeline, concepts: list[Concept], tmp_path: Path
) -> None:
    encoder = text_encoder(pipeline)
    mark = text_mark(encoder)
    made = [
        concepts[0],
        merge_concepts(concepts, encoder, captions=CAPTIONS)[0],
        project_on_own_words(concepts[0], encoder, captions=CAPTIONS)[0],
    ]
    for number, concept in enumerate(made):
        file = write_concept(concept, tmp_path / f"{number}.safetensors")
        read = read_concept(file)
        assert text_remark(read, mark) == ""
        for other in (skipping(pipeline, 1), text_encoder(tiny_pipeline(seed=5))):
            remark = text_remark(read, text_mark(other))
            assert "another text encoder, or at another clip skip" in remark


def test_precision_makes_no_other_encoder(
    pipeline: StableDiffusionPipeline, concepts: list[Concept]
) -> None:
    rounded = text_encoder(tiny_pipeline())
    rounded.to(torch.device("cpu"), torch.bfloat16)
    mark = text_mark(rounded)
    assert mark != text_mark(text_encoder(pipeline))
    assert text_remark(concepts[0], mark) == ""


@pytest.mark.parametrize("odd", [None, [], "x", [1.0], ["x"] * 32, {"a": 1}, [None] * 32])
def test_what_a_stranger_wrote_is_no_mark(
    pipeline: StableDiffusionPipeline, concepts: list[Concept], odd: Any
) -> None:
    strange = replace(concepts[0], provenance={**concepts[0].provenance, TEXT_MARK: odd})
    assert text_remark(strange, text_mark(text_encoder(pipeline))) == ""
