"""A prior without pictures, against two predictions by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from custom_diffusion.concept.errors import ConfigError
from custom_diffusion.host.diffusers.lending import DiffusersModels, borrowed_models
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.data.batches import Batch
from custom_diffusion.trainer.economy.backward import Backward
from custom_diffusion.trainer.learner import Learner
from custom_diffusion.trainer.learning.class_prior import class_prompts
from custom_diffusion.trainer.learning.samples import drawn_noise, samples_of
from custom_diffusion.trainer.prepare import prepare
from support.tiny_models import RESOLUTION, cat_concept, tiny_pipeline

CONFIG = TrainConfig(
    class_prior=0.7, gradient_cut="start and padding", batch_size=3, resolution=RESOLUTION
)
BATCH = Batch(
    latents_bchw=torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    masks_bhw=torch.ones(3, 8, 8).tril(),
    prompts=("photo of a <new1> cat", "far away <new1> cat", "a cat"),
    sizes=torch.zeros(3, 6),
    prior=1,
)


@pytest.fixture(scope="module")
def models() -> Iterator[DiffusersModels]:
    with borrowed_models(tiny_pipeline()) as lent:
        yield lent


def test_class_prompts_are_those_without_trigger_words() -> None:
    prompts = ["photo of a <new1> cat", "<new1> cat and a <new2> dog"]
    assert class_prompts(prompts, ["<new1>", "<new2>", ""]) == ["photo of a cat", "cat and a dog"]


def test_it_is_the_distance_between_two_predictions(models: DiffusersModels) -> None:
    found = []
    for at_once in (0, 1):
        learner = Learner(CONFIG, [cat_concept()], None, models.denoiser, models.text_encoder)
        text = learner.prompts.encode(BATCH.prompts).as_leaves()
        drawn = drawn_noise(BATCH, torch.Generator().manual_seed(1), models.denoiser, CONFIG)
        plain = samples_of(BATCH, *drawn, text, models.denoiser, CONFIG)
        samples = learner.with_class_prior(plain, BATCH)
        with learner.learning():
            (weight,) = learner.projections.parameters()
            network = models.denoiser.network
            with torch.no_grad():
                weight += 0.01 * torch.randn(
                    weight.shape, generator=torch.Generator().manual_seed(2)
                )
            backward = Backward(models.denoiser, at_once, False, lambda *_: None)
            loss = backward(learner.loss_of, samples, learner.parameters)
            assert weight.grad is not None
            gradient = weight.grad.clone()
            without = backward(learner.loss_of, plain, learner.parameters)
            rest = gradient - weight.grad
            classes = learner.prompts.encode(["photo of a cat", "far away cat"])
            weight.grad = None
            given = (plain.noisy_latents_bchw[:2], plain.timesteps[:2], classes.features.context)
            learnt = learner.projections.predict(*given, passing=classes.passing)
            kept = learnt
        with torch.no_grad():
            own = network(given[0], given[1], encoder_hidden_states=given[2]).sample
        wanted = 0.7 * (kept - own).square().mean()
        wanted.backward()
        assert loss - without == pytest.approx(float(wanted.detach()), rel=1e-3)
        torch.testing.assert_close(rest, weight.grad, atol=1e-5, rtol=1e-2)
        found.append(loss)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_class_prompt_may_have_fewer_chunks(models: DiffusersModels) -> None:
    """One trigger word more than 75 tokens: two chunks, of which the class prompt has one."""
    long = "cat " * 75
    batch = replace(BATCH, prompts=(f"<new1> {long}", *BATCH.prompts[1:]))
    learner = Learner(CONFIG, [cat_concept()], None, models.denoiser, models.text_encoder)
    text = learner.prompts.encode(batch.prompts).as_leaves()
    drawn = drawn_noise(batch, torch.Generator().manual_seed(1), models.denoiser, CONFIG)
    plain = samples_of(batch, *drawn, text, models.denoiser, CONFIG)
    samples = learner.with_class_prior(plain, batch)
    short = learner.prompts.encode([long, "far away cat"]).features.context
    assert plain.context.shape[1] == 2 * short.shape[1] == 2 * 77
    assert torch.equal(samples.context[3:], short.repeat(1, 2, 1))
    assert samples.passing is not None and samples.passing.shape == samples.context.shape[:2]
    with learner.learning():
        backward = Backward(models.denoiser, 1, False, lambda *_: None)
        assert backward(learner.loss_of, samples, learner.parameters) > 0


def test_where_it_means_nothing_it_is_refused(models: DiffusersModels) -> None:
    parts = models.latent_encoder, models.text_encoder
    settings = {"class_prior": 1.0, "resolution": RESOLUTION, "augment": False}
    with pytest.raises(ConfigError, match="own words' does not change"):
        prepare(cat_concept(), TrainConfig(**settings), *parts)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'dreambooth' changes more"):
        prepare(cat_concept(), TrainConfig(method="dreambooth", **settings), *parts)  # type: ignore[arg-type]
