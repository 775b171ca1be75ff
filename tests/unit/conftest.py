"""Fixtures of the unit tests. The pipelines are shared by all tests: a test that changes a weight
copies the model first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import pytest
from custom_diffusion.diffusion.sampling import ddim_sample
from custom_diffusion.host.diffusers.lending import DiffusersModels, borrowed_models
from custom_diffusion.trainer import loop
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from support import tiny_models
from transformers import CLIPTokenizer


@pytest.fixture(scope="module", autouse=True)
def short_previews() -> Iterator[None]:
    """Of 3 steps of sampling, not 20: drawing one takes longer than a whole training of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "ddim_sample", partial(ddim_sample, steps=3))
        yield


@pytest.fixture(scope="session")
def tokenizer() -> CLIPTokenizer:
    return tiny_models.clip_tokenizer()


@pytest.fixture(scope="session")
def pipeline() -> StableDiffusionPipeline:
    """A tiny Stable Diffusion 1.x that predicts the noise."""
    return tiny_models.tiny_pipeline()


@pytest.fixture(scope="session")
def v_pipeline(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """The same models with a schedule that predicts the velocity."""
    result = copy.copy(pipeline)
    result.scheduler = tiny_models.sd_scheduler("v_prediction")
    return result


@pytest.fixture(scope="session")
def xl_pipeline() -> StableDiffusionXLPipeline:
    """A tiny Stable Diffusion XL."""
    return tiny_models.tiny_xl_pipeline()


@pytest.fixture
def models(pipeline: StableDiffusionPipeline) -> Iterator[DiffusersModels]:
    """The pipeline's models, borrowed for one test."""
    with borrowed_models(pipeline) as borrowed:
        yield borrowed
