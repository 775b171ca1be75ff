"""Trainings that go on from a concept: with its own word, or with one more."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from custom_diffusion.composition.routing import Route
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import ConfigError, IncompatibleModelError
from custom_diffusion.host.diffusers.lending import DiffusersModels, borrowed_models, text_encoder
from custom_diffusion.host.diffusers.routing import route, routing
from custom_diffusion.host.diffusers.sampling import applied_concept
from custom_diffusion.trainer.config import MethodName, TrainConfig
from custom_diffusion.trainer.data.batches import Batches, step_randomness
from custom_diffusion.trainer.data.training_concept import TrainingConcept
from custom_diffusion.trainer.events import Event, WordsAlike
from custom_diffusion.trainer.loop import train
from diffusers import StableDiffusionPipeline
from support.naive_training import layer_of, naive_training
from support.tiny_models import RESOLUTION, cat_concept, dog_concept, random_bank

pytestmark = [pytest.mark.slow, pytest.mark.any_version]

KEPT: tuple[MethodName, ...] = (
    "custom diffusion",
    "low-rank",
    "cross-attention",
    "textual inversion",
)


def config(method: MethodName = "custom diffusion", **changes: Any) -> TrainConfig:
    settings = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "resolution": RESOLUTION}
    return TrainConfig(method=method, rank=2, preview_every_steps=0, **{**settings, **changes})


def trained(
    models: DiffusersModels, concept: TrainingConcept, settings: TrainConfig, **options: Any
) -> Concept:
    bank = random_bank(concept)
    return train(settings, [concept], [bank], models.denoiser, models.text_encoder, **options)


def assert_holds(concept: Concept, part: Concept) -> None:
    """All that `part` is, is in `concept` unchanged."""
    assert concept.deltas.keys() >= part.deltas.keys()
    for layer, delta in part.deltas.items():
        torch.testing.assert_close(concept.deltas[layer].dense(), delta.dense())
    words = {token.name: token for token in concept.tokens}
    for token in part.tokens:
        assert torch.equal(words[token.name].embeddings["clip_l"], token.embeddings["clip_l"])
    assert set(part.constraint_prompts) <= set(concept.constraint_prompts)


@pytest.mark.parametrize("method", KEPT)
@pytest.mark.parametrize("taught", [cat_concept(), dog_concept()])
def test_without_a_step_all_is_as_it_was(
    models: DiffusersModels, method: MethodName, taught: TrainingConcept
) -> None:
    start = trained(models, cat_concept(), config(method))
    kept = trained(models, taught, config(method), earlier=start, should_stop=lambda: True)
    assert_holds(kept, start)
    assert [token.name for token in kept.tokens] == list(dict.fromkeys(["<new1>", taught.token]))
    assert kept.base_hash == start.base_hash
    assert "<new1> cat" in kept.provenance["went_on_from"]


def test_one_more_concept_is_learnt_as_by_a_naive_loop_on_the_changed_model(
    pipeline: StableDiffusionPipeline,
) -> None:
    with borrowed_models(pipeline) as models:
        start = trained(models, dog_concept(), config())
        both = trained(models, cat_concept(), config(), earlier=start)
    changed = copy.copy(pipeline)
    with applied_concept(pipeline, start):
        changed.unet = copy.deepcopy(pipeline.unet)
    losses, changes, rows = naive_training(
        changed,
        config(),
        [cat_concept()],
        [random_bank(cat_concept())],
        elsewhere=pipeline.unet,
    )
    np.testing.assert_allclose(both.provenance["final_losses"], losses, atol=1e-5, rtol=0)
    assert [token.name for token in both.tokens] == ["<new2>", "<new1>"]
    torch.testing.assert_close(both.tokens[1].embeddings["clip_l"], rows, atol=1e-5, rtol=1e-3)
    first = start.tokens[0].embeddings["clip_l"]
    assert torch.equal(both.tokens[0].embeddings["clip_l"], first)
    assert len(changes) == len(both.deltas) == 12
    for name, change in changes.items():
        layer = layer_of(name)
        wanted = start.deltas[layer].dense() + change
        # Not number by number: Adam blows up the rounding of gradients that are almost zero.
        assert (both.deltas[layer].dense() - wanted).norm() < 1e-4 * change.norm()


def test_words_that_are_one_are_told_of_before_the_first_step(models: DiffusersModels) -> None:
    start = trained(models, cat_concept(), config(steps=1))
    (word,) = start.tokens
    alike = replace(start, tokens=(word, replace(word, name="<other>")))
    for before, notices in ((start, 0), (alike, 1)):
        events: list[Event] = []
        trained(models, dog_concept(), config(steps=1), earlier=before, on_event=events.append)
        told = [event.text() for event in events if isinstance(event, WordsAlike)]
        assert len(told) == notices
        assert not told or isinstance(events[0], WordsAlike)
        assert not told or "<new1> and <other> of the concept to extend" in told[0]


@pytest.mark.parametrize("method", KEPT)
def test_the_same_word_learns_on(pipeline: StableDiffusionPipeline, method: MethodName) -> None:
    """The first loss is that of the concept applied by the host, where it means every word."""
    cat, cut = cat_concept(), {"gradient_cut": "start and padding"}
    with borrowed_models(pipeline) as models:
        start = trained(models, cat, config(method, learning_rate=1e-2, **cut))
        more = trained(models, cat, config(method, steps=1), earlier=start)
        fresh = trained(models, cat, config(method, steps=1, **cut))
    with applied_concept(pipeline, start) as encoder, borrowed_models(pipeline) as models:
        # Its word is known now, so a concept without one that says it asks the same of the model.
        said = replace(cat, token="", initializer="")
        bank = random_bank(cat)
        settings = config("custom diffusion", steps=1, **cut)
        judge = train(settings, [said], [bank], models.denoiser, encoder)
    (loss,), (judged,) = (c.provenance["final_losses"] for c in (more, judge))
    assert loss == pytest.approx(judged, rel=1e-5)
    assert loss != pytest.approx(fresh.provenance["final_losses"][0], rel=1e-4)
    (word,), (before,) = more.tokens, start.tokens
    assert not torch.equal(word.embeddings["clip_l"], before.embeddings["clip_l"])
    assert more.constraint_prompts == start.constraint_prompts


@pytest.mark.parametrize("method", ["custom diffusion", "low-rank"])
def test_a_concept_of_its_own_words_learns_on_as_the_host_routes_it(
    pipeline: StableDiffusionPipeline, method: MethodName
) -> None:
    """The first loss is that of a UNet in which the concept is routed."""
    cat, settings = cat_concept(), config(method, steps=1)
    bank = random_bank(cat)
    with borrowed_models(pipeline) as models:
        start = trained(models, cat, config(method, learning_rate=1e-2))
        more = trained(models, cat, settings, earlier=start)
        fresh = trained(models, cat, settings)
    assert start.scope == more.scope == "own words"

    rng, generator = step_randomness(settings.seed, 0)
    batch = Batches([bank], settings).of_step(0, rng, generator)
    noise = torch.randn(batch.latents_bchw.shape, generator=generator)
    timesteps = torch.randint(1000, (settings.batch_size,), generator=generator)
    noisy = pipeline.scheduler.add_noise(batch.latents_bchw, noise, timesteps)
    encoder = text_encoder(pipeline).with_tokens(start.embeddings())
    with routing(pipeline) as router, torch.no_grad():
        context = encoder.encode(encoder.pad([encoder.tokenize(p) for p in batch.prompts]))
        route(router, [Route(start)], encoder, batch.prompts, context)
        output = pipeline.unet(noisy, timesteps, context).sample
    errors = (output - noise).square().mean(1) * batch.masks_bhw
    routed = (errors.sum((1, 2)) / batch.masks_bhw.sum((1, 2))).mean()
    assert more.provenance["final_losses"] == pytest.approx([float(routed)], rel=1e-5)
    assert fresh.provenance["final_losses"][0] != pytest.approx(float(routed), rel=1e-4)


def test_a_concept_of_every_word_goes_on_as_it_was_taught(models: DiffusersModels) -> None:
    start = trained(models, cat_concept(), config(gradient_cut="start"))
    more = trained(models, cat_concept(), config(), earlier=start)
    same = trained(models, cat_concept(), config(gradient_cut="start and padding"), earlier=start)
    assert start.scope == more.scope == "every word"
    assert more.provenance["final_losses"] == same.provenance["final_losses"]


def test_factors_of_a_lower_rank_learn_on(models: DiffusersModels) -> None:
    start = trained(models, cat_concept(), config("low-rank"))
    settings = replace(config("low-rank"), rank=5)
    kept = trained(models, dog_concept(), settings, earlier=start, should_stop=lambda: True)
    assert_holds(kept, start)
    assert {delta.rank for delta in kept.deltas.values()} == {5}


def test_more_than_the_method_trains_is_refused(models: DiffusersModels) -> None:
    start = trained(models, cat_concept(), config("cross-attention", steps=1))
    with pytest.raises(ConfigError, match=r"queries and outputs.*'cross-attention'"):
        trained(models, cat_concept(), config(), earlier=start)


@pytest.mark.parametrize("method, given", [("low-rank", "rank 4"), ("custom diffusion", "no low")])
def test_factors_of_a_higher_rank_are_refused(
    models: DiffusersModels, method: MethodName, given: str
) -> None:
    start = trained(models, cat_concept(), replace(config(method, steps=1), rank=4))
    with pytest.raises(ConfigError, match=f"of {given}.*would continue at rank 3"):
        trained(models, cat_concept(), replace(config("low-rank"), rank=3), earlier=start)


def test_low_rank_goes_on_densely(models: DiffusersModels) -> None:
    start = trained(models, cat_concept(), config("low-rank"))
    kept = trained(models, dog_concept(), config(), earlier=start, should_stop=lambda: True)
    assert_holds(kept, start)


def test_a_concept_of_another_checkpoint_is_refused(models: DiffusersModels) -> None:
    start = replace(trained(models, cat_concept(), config(steps=1)), base_hash="0" * 32)
    with pytest.raises(IncompatibleModelError, match=r"another checkpoint .* 00000000"):
        trained(models, dog_concept(), config(), earlier=start)
