"""The training loop against a naive one, its promises about seeds and borrowed models, its events.

The naive loop shares nothing with the pack but the order in which random numbers are drawn.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import ConfigError, TokenError, TrainingError
from custom_diffusion.concept.text import TextFeatures
from custom_diffusion.host.clip.text_encoder import ClipTextEncoder
from custom_diffusion.host.diffusers.denoiser import DiffusersDenoiser
from custom_diffusion.host.diffusers.lending import DiffusersModels, borrowed_models
from custom_diffusion.merge.merging import merge_concepts
from custom_diffusion.trainer.config import GradientCut, TrainConfig
from custom_diffusion.trainer.data.captioned import CaptionedImage
from custom_diffusion.trainer.data.latents import LatentBank
from custom_diffusion.trainer.data.training_concept import TrainingConcept
from custom_diffusion.trainer.economy import cpu_attention
from custom_diffusion.trainer.events import Event, PreviewDrawn, StepDone, WordsMoved
from custom_diffusion.trainer.loop import train
from diffusers import StableDiffusionPipeline
from PIL import Image
from support.naive_training import layer_of, naive_training
from support.tiny_models import (
    RESOLUTION,
    VOCABULARY_SIZE,
    cat_concept,
    dog_concept,
    random_bank,
    requires_grad_map,
    same_state,
    state,
    training_map,
)
from torch import Tensor

pytestmark = pytest.mark.slow


def config(**changes: Any) -> TrainConfig:
    settings = {
        "steps": 3,
        "batch_size": 3,
        "learning_rate": 1e-3,
        "resolution": RESOLUTION,
        "preview_every_steps": 0,
    }
    return TrainConfig(**{**settings, **changes})


def trained(
    models: DiffusersModels,
    settings: TrainConfig,
    concept: TrainingConcept | None = None,
    bank: LatentBank | None = None,
    **options: Any,
) -> Concept:
    concept = concept or cat_concept()
    bank = bank or random_bank(concept)
    return train(settings, [concept], [bank], models.denoiser, models.text_encoder, **options)


def trained_together(
    models: DiffusersModels, settings: TrainConfig, *concepts: TrainingConcept, **options: Any
) -> Concept:
    banks = [random_bank(concept) for concept in concepts]
    return train(settings, concepts, banks, models.denoiser, models.text_encoder, **options)


def same_concept(one: Concept, other: Concept) -> bool:
    return (
        one.provenance["final_losses"] == other.provenance["final_losses"]
        and all(torch.equal(one.deltas[k].dense(), other.deltas[k].dense()) for k in one.layers)
        and torch.equal(rows_of(one), rows_of(other))
    )


def row_of(concept: Concept) -> Tensor:
    return concept.tokens[0].embeddings["clip_l"]


def rows_of(concept: Concept) -> Tensor:
    return torch.cat([token.embeddings["clip_l"] for token in concept.tokens])


def assert_equal_to_naive(
    pipeline: StableDiffusionPipeline, settings: TrainConfig, *concepts: TrainingConcept
) -> None:
    with borrowed_models(pipeline) as models:
        ours = trained_together(models, settings, *concepts)
    banks = [random_bank(concept) for concept in concepts]
    losses, changes, rows = naive_training(pipeline, settings, concepts, banks)
    deltas = {layer_of(name): change for name, change in changes.items()}
    np.testing.assert_allclose(ours.provenance["final_losses"], losses, atol=1e-5, rtol=0)
    assert ours.deltas.keys() == deltas.keys()
    for layer, delta in deltas.items():
        assert delta.any()
        torch.testing.assert_close(ours.deltas[layer].dense(), delta, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(rows_of(ours), rows, atol=1e-5, rtol=1e-3)


# Equal to a naive loop


@pytest.mark.parametrize("cut", ["none", "start", "start and padding"])  # below: own words
def test_three_steps_equal_those_of_a_naive_loop(
    pipeline: StableDiffusionPipeline, cut: GradientCut
) -> None:
    assert_equal_to_naive(pipeline, config(gradient_cut=cut), cat_concept())


def test_three_steps_with_regularization_equal_those_of_a_naive_loop(
    pipeline: StableDiffusionPipeline,
) -> None:
    settings = config(batch_size=4, prior_weight=0.7, seed=5)
    assert_equal_to_naive(pipeline, settings, cat_concept(2, regularization=2))


def test_three_steps_of_v_prediction_equal_those_of_a_naive_loop(
    v_pipeline: StableDiffusionPipeline,
) -> None:
    assert_equal_to_naive(v_pipeline, config(batch_size=2), cat_concept())


def test_three_steps_with_clipped_gradients_equal_those_of_a_naive_loop(
    pipeline: StableDiffusionPipeline,
) -> None:
    """The gradients are some hundred times longer, and not equally long at every step."""
    assert_equal_to_naive(pipeline, config(batch_size=2, max_gradient_norm=1e-5), cat_concept())


def test_three_steps_without_clipping_or_decay_equal_those_of_a_naive_loop(
    pipeline: StableDiffusionPipeline,
) -> None:
    settings = config(batch_size=2, max_gradient_norm=0.0, weight_decay=0.0)
    assert_equal_to_naive(pipeline, settings, cat_concept())


def test_three_steps_of_two_concepts_equal_those_of_a_naive_loop(
    pipeline: StableDiffusionPipeline,
) -> None:
    """In the last two of a batch regularization images of both, in turn."""
    concepts = cat_concept(2, regularization=1), dog_concept(3, regularization=2)
    assert_equal_to_naive(pipeline, config(batch_size=4, prior_weight=0.7), *concepts)


def test_v_prediction_and_epsilon_learn_different_things(
    pipeline: StableDiffusionPipeline, v_pipeline: StableDiffusionPipeline
) -> None:
    results = []
    for either in (pipeline, v_pipeline):
        with borrowed_models(either) as models:
            results.append(trained(models, config()))
    assert results[0].provenance["final_losses"][0] != results[1].provenance["final_losses"][0]
    assert not same_concept(*results)


def test_training_lowers_the_loss(models: DiffusersModels) -> None:
    concept = cat_concept(images=1)
    events: list[Event] = []
    settings, bank = config(steps=30, batch_size=2), random_bank(concept, views=1)
    result = trained(models, settings, concept, bank, on_event=events.append)
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    assert result.provenance["final_losses"] == losses[-20:]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.02


# Seeds


def test_the_same_seed_gives_the_same_concept_to_the_bit(models: DiffusersModels) -> None:
    assert same_concept(trained(models, config(seed=3)), trained(models, config(seed=3)))


def test_another_seed_gives_another_concept(models: DiffusersModels) -> None:
    assert not same_concept(trained(models, config(seed=3)), trained(models, config(seed=4)))


def test_the_global_generators_are_neither_read_nor_moved(models: DiffusersModels) -> None:
    torch.manual_seed(1)
    first = trained(models, config(preview_every_steps=2))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    torch.manual_seed(2)
    moved = torch.get_rng_state()
    second = trained(models, config(preview_every_steps=2))
    assert torch.equal(torch.get_rng_state(), moved)
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    assert same_concept(first, second)


def test_previews_do_not_change_what_is_learnt(models: DiffusersModels) -> None:
    with_previews = trained(models, config(preview_every_steps=1))
    assert same_concept(with_previews, trained(models, config()))


# What is borrowed


def everything(pipeline: StableDiffusionPipeline) -> tuple[Any, ...]:
    return pipeline.unet, pipeline.text_encoder, pipeline.vae


def test_no_weight_of_the_models_changes_by_a_bit(
    pipeline: StableDiffusionPipeline, models: DiffusersModels
) -> None:
    modules = everything(pipeline)
    weights, names = state(*modules), [[n for n, _ in m.named_modules()] for m in modules]
    flags, modes = requires_grad_map(*modules), training_map(*modules)
    trained(models, config(preview_every_steps=2), cat_concept(regularization=1))
    assert same_state(weights, *modules)
    assert [[n for n, _ in m.named_modules()] for m in modules] == names
    assert requires_grad_map(*modules) == flags
    assert training_map(*modules) == modes
    assert all(p.grad is None for module in modules for p in module.parameters())


def test_large_pictures_in_half_precision_are_computed_with_channels_last(
    pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = copy.copy(pipeline)
    half.unet = copy.deepcopy(pipeline.unet).to(torch.bfloat16)
    weight = half.unet.conv_in.weight
    seen = []
    with borrowed_models(half) as models:
        own = models.denoiser.predict

        def predict(*given: Any) -> Tensor:
            seen.append(weight.is_contiguous(memory_format=torch.channels_last))
            return own(*given)

        monkeypatch.setattr(models.denoiser, "predict", predict)
        before = state(half.unet)
        large = trained(models, config(resolution=256))
        small = trained(models, config(resolution=248))
    assert seen == [True] * 3 + [False] * 3
    assert same_state(before, half.unet)
    assert all(p.is_contiguous() for p in half.unet.parameters())
    losses = [concept.provenance["final_losses"] for concept in (large, small)]
    np.testing.assert_allclose(*losses, rtol=0.02)


def test_large_pictures_in_half_precision_have_our_attention_on_a_cpu(
    pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    concept = cat_concept()
    bank = random_bank(concept, edge=32)
    half = copy.copy(pipeline)
    half.unet = copy.deepcopy(pipeline.unet).to(torch.bfloat16)
    keys = []
    own = cpu_attention.attention

    def attention(*given: Tensor) -> Tensor:
        keys.append(given[1].shape[-2])
        return own(*given)

    monkeypatch.setattr(cpu_attention, "attention", attention)

    def losses(of: StableDiffusionPipeline, **settings: Any) -> list[float]:
        keys.clear()
        with borrowed_models(of) as models:
            learnt = trained(models, config(**settings), concept, bank)
        return learnt.provenance["final_losses"]  # type: ignore[no-any-return]

    large = losses(half, resolution=256)
    assert set(keys) == {1024}
    calls = len(keys)
    assert losses(half, resolution=256, gradient_checkpointing=True) == large
    assert len(keys) == 2 * calls
    small = losses(half, resolution=248)
    assert not keys
    exact = losses(pipeline, resolution=256)
    assert not keys
    assert large != small
    np.testing.assert_allclose(large, small, rtol=0.01)
    np.testing.assert_allclose(large, exact, rtol=0.02)


@pytest.mark.parametrize("fails_in", ["should_stop", "on_event"])
def test_the_models_are_as_before_when_a_callback_fails(
    pipeline: StableDiffusionPipeline, models: DiffusersModels, fails_in: str
) -> None:
    def fail(*_: object) -> bool:
        raise KeyboardInterrupt

    modules = everything(pipeline)
    weights = state(*modules)
    with pytest.raises(KeyboardInterrupt):
        trained(models, config(), **{fails_in: fail})
    assert same_state(weights, *modules)


def test_a_loss_that_is_not_finite_ends_the_training_and_says_so(
    pipeline: StableDiffusionPipeline,
) -> None:
    broken = copy.copy(pipeline)
    broken.unet = copy.deepcopy(pipeline.unet)
    with torch.no_grad():
        broken.unet.conv_out.weight[0, 0, 0, 0] = torch.nan
    names, flags = [n for n, _ in broken.unet.named_modules()], requires_grad_map(broken.unet)
    others = state(pipeline.text_encoder)
    events: list[Event] = []
    with pytest.raises(TrainingError) as caught, borrowed_models(broken) as models:
        trained(models, config(), on_event=events.append)
    message = str(caught.value)
    assert "The loss became nan at step 1 (learning rate 0.001, weights in float32)" in message
    assert "A finite number was needed" in message
    assert "The learning rate is not to blame: the UNet itself makes numbers" in message
    assert "train in float32" not in message
    assert events == []
    assert [n for n, _ in broken.unet.named_modules()] == names
    assert requires_grad_map(broken.unet) == flags
    assert same_state(others, pipeline.text_encoder)


def test_an_unusable_initializer_is_refused_before_training(models: DiffusersModels) -> None:
    with pytest.raises(TokenError, match="one whole word is needed"):
        trained(models, config(), cat_concept(initializer="xqzzvk"))


# What is learnt


def test_the_row_of_the_token_and_every_projection_are_learnt(models: DiffusersModels) -> None:
    start = models.text_encoder.vocabulary_row(42170)["clip_l"]
    result = trained(models, config(weight_decay=0.0))
    assert row_of(result).shape == (1, 768)
    assert ((row_of(result) - start).abs() > 1e-5).float().mean() > 0.9
    assert len(result.deltas) == 12
    for delta in result.deltas.values():
        assert delta.dense().dtype == torch.float32
        assert delta.dense().any()


def test_the_row_starts_at_the_initializer(models: DiffusersModels) -> None:
    settings = config(steps=1, learning_rate=1e-6)
    result = trained(models, settings, cat_concept(initializer="cat"))
    start = models.text_encoder.vocabulary_row(2368)["clip_l"]
    torch.testing.assert_close(row_of(result), start, atol=2e-6, rtol=0)
    assert result.tokens[0].initializer == "cat"


def test_tokens_of_one_series_start_at_different_rare_words(models: DiffusersModels) -> None:
    settings = config(steps=1, learning_rate=1e-6)
    for number, token_id in enumerate((42170, 47629, 43514), start=1):
        token = f"<new{number}>"
        image = CaptionedImage(cat_concept().images[0].source, f"photo of a {token} cat")
        concept = dataclasses.replace(cat_concept(), token=token, images=(image,))
        row = row_of(trained(models, settings, concept))
        start = models.text_encoder.vocabulary_row(token_id)["clip_l"]
        torch.testing.assert_close(row, start, atol=2e-6, rtol=0)


def test_what_was_learnt_cannot_change_afterwards(models: DiffusersModels) -> None:
    result = trained(models, config(steps=1))
    assert not row_of(result).requires_grad
    assert all(not delta.dense().requires_grad for delta in result.deltas.values())


def test_a_concept_says_what_it_is_and_where_it_came_from(models: DiffusersModels) -> None:
    settings = config(steps=2, batch_size=2, gradient_cut="start and padding")
    result = trained(models, settings, cat_concept(2, regularization=3))
    assert result.family.name == "sd15"
    assert (result.tokens[0].name, result.tokens[0].class_noun) == ("<new1>", "cat")
    assert result.constraint_prompts == ("<new1> cat", "photo of a <new1> cat")
    assert len(result.base_hash) == 32
    assert result.provenance["method"] == "custom diffusion"
    assert result.provenance["steps"] == 2
    assert len(result.provenance["final_losses"]) == 2
    assert result.provenance["instance_images"] == 2
    assert result.provenance["regularization_images"] == 3
    assert TrainConfig(**result.provenance["config"]) == settings


# Several concepts together


def test_every_token_learns(models: DiffusersModels) -> None:
    """Kumari et al.'s own code skips the last index when it clears the gradients of all other
    words: there the last of several tokens learns nothing.
    """
    encoder = models.text_encoder
    starts = torch.cat([encoder.vocabulary_row(row)["clip_l"] for row in (42170, 47629)])
    settings = config(weight_decay=0.0)  # what moves, moves by its gradient
    for concepts in ((cat_concept(), dog_concept()), (dog_concept(), cat_concept())):
        result = trained_together(models, settings, *concepts)
        learnt = {token.name: token.embeddings["clip_l"] for token in result.tokens}
        moved = torch.cat([learnt["<new1>"], learnt["<new2>"]]) - starts
        assert ((moved.abs() > 1e-5).float().mean(1) > 0.9).all()


def test_one_concept_holds_all_that_was_taught_together(models: DiffusersModels) -> None:
    concepts = dog_concept(3, regularization=1), cat_concept(2, regularization=2, initializer="cat")
    result = trained_together(
        models, config(steps=1, batch_size=2, gradient_cut="start"), *concepts
    )
    assert result.scope == "every word"
    assert [(t.name, t.class_noun, t.initializer) for t in result.tokens] == [
        ("<new2>", "dog", ""),
        ("<new1>", "cat", "cat"),
    ]
    assert all(token.embeddings["clip_l"].shape == (1, 768) for token in result.tokens)
    assert result.constraint_prompts == (
        "<new2> dog", "photo of a <new2> dog", "<new1> cat", "photo of a <new1> cat",
    )  # fmt: skip
    assert len(result.deltas) == 12
    assert result.provenance["instance_images"] == 5
    assert result.provenance["regularization_images"] == 3


def test_concepts_with_one_token_cannot_be_taught_together(models: DiffusersModels) -> None:
    with pytest.raises(ConfigError) as caught:
        trained_together(models, config(), cat_concept(), dog_concept(), cat_concept(3))
    assert "trigger words are <new1>, <new2>, <new1>" in str(caught.value)
    assert "rename those that are the same" in str(caught.value)


def test_a_category_is_taught_without_a_token(models: DiffusersModels) -> None:
    picture = Image.new("RGB", (RESOLUTION, RESOLUTION), "white")
    moongate = TrainingConcept((CaptionedImage(picture, "photo of a moongate"),), "moongate")
    result = trained(models, config(), moongate)
    assert result.tokens == ()
    assert result.constraint_prompts == ("moongate", "photo of a moongate")
    assert all(delta.dense().abs().max() > 0 for delta in result.deltas.values())
    merged, report = merge_concepts(
        [result, trained(models, config())], models.text_encoder, captions=["a dog", "a cat"]
    )
    assert [token.name for token in merged.tokens] == ["<new1>"]
    assert max(report.residuals) < 0.01


# Stopping and events


@pytest.mark.parametrize("after", [0, 1, 2])
def test_stopping_keeps_the_steps_that_were_done(models: DiffusersModels, after: int) -> None:
    events: list[Event] = []
    result = trained(
        models, config(), should_stop=lambda: len(events) >= after, on_event=events.append
    )
    assert result.provenance["steps"] == len(result.provenance["final_losses"]) == after
    assert same_concept(result, trained(models, config(steps=after))) if after else True
    assert any(delta.dense().any() for delta in result.deltas.values()) == (after > 0)


def test_every_step_is_told_with_its_loss(models: DiffusersModels) -> None:
    events: list[Event] = []
    result = trained(models, config(steps=4), on_event=events.append)
    losses = result.provenance["final_losses"]
    assert events == [StepDone(n, loss) for n, loss in enumerate(losses, start=1)]


def test_how_far_the_words_have_moved_is_told(models: DiffusersModels) -> None:
    moved: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, WordsMoved):
            moved.append(event.drift["<new1>"])

    learnt = trained(models, config(steps=20), on_event=listen)
    began = trained(models, config(steps=1), should_stop=lambda: True)
    (now,), (before,) = learnt.embeddings().values(), began.embeddings().values()
    far = (now["<new1>"] - before["<new1>"]).norm() / before["<new1>"].norm()
    assert len(moved) == 2 and 0 < moved[0] < moved[1] == pytest.approx(float(far))


def test_previews_are_drawn_at_their_steps(models: DiffusersModels) -> None:
    events: list[Event] = []
    trained(models, config(steps=5, preview_every_steps=2), on_event=events.append)
    order = [(type(event).__name__, event.step) for event in events]
    assert order == [
        ("StepDone", 1), ("StepDone", 2), ("PreviewBegun", 2), ("PreviewDrawn", 2),
        ("StepDone", 3), ("StepDone", 4), ("PreviewBegun", 4), ("PreviewDrawn", 4),
        ("StepDone", 5),
    ]  # fmt: skip
    pictures = [event.image_hwc for event in events if isinstance(event, PreviewDrawn)]
    for picture in pictures:
        assert picture.shape == (RESOLUTION, RESOLUTION, 3)
        assert picture.dtype == torch.float32
        assert picture.isfinite().all()
        assert 0 <= picture.min() <= picture.max() <= 1
        assert not picture.requires_grad
    assert not torch.equal(*pictures)


def test_samples_of_several_seeds_and_a_size_of_their_own_are_a_grid(
    models: DiffusersModels,
) -> None:
    """Each picture of the grid is the one that a run draws with that prompt and seed alone."""

    def sample(prompts: str, seeds: str) -> Tensor:
        settings = config(
            steps=1,
            preview_every_steps=1,
            preview_prompts=prompts,
            preview_seeds=seeds,
            preview_resolution=128,
        )
        events: list[Event] = []
        trained(models, settings, on_event=events.append)
        (picture,) = (event.image_hwc for event in events if isinstance(event, PreviewDrawn))
        return picture

    grid = sample("a cat\na <new1> cat", "7, 3")
    assert grid.shape == (256, 256, 3)
    assert torch.equal(grid[:128, 128:], sample("a <new1> cat", "7"))
    assert torch.equal(grid[128:, :128], sample("a cat", "3"))


class CountingEncoder:
    """Counts how often each prompt's ids are encoded, by this encoder or one made from it."""

    def __init__(self, encoder: ClipTextEncoder, counts: Counter[tuple[int, ...]]) -> None:
        self._encoder, self._counts = encoder, counts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode_with_pooled(self, token_ids: Tensor) -> TextFeatures:
        self._counts.update(tuple(row) for row in token_ids.tolist())
        return self._encoder.encode_with_pooled(token_ids)

    def with_tokens(self, embeddings: Mapping[str, Mapping[str, Tensor]]) -> CountingEncoder:
        return CountingEncoder(self._encoder.with_tokens(embeddings), self._counts)


def test_prompts_without_the_token_are_encoded_once(models: DiffusersModels) -> None:
    counts: Counter[tuple[int, ...]] = Counter()
    concept = cat_concept(2, regularization=2)
    train(
        config(steps=6, batch_size=4, preview_every_steps=2),
        [concept],
        [random_bank(concept)],
        models.denoiser,
        CountingEncoder(models.text_encoder, counts),
    )
    known = {ids for ids in counts if VOCABULARY_SIZE in ids}
    without = {ids: counts[ids] for ids in counts.keys() - known}
    with_token = {ids for ids in known if len(ids) == models.text_encoder.context_length}
    assert list(without.values()) == [1, 1, 1]  # two regularization captions, the empty prompt
    assert len(with_token) == 2  # whole and far away
    assert sum(counts[ids] for ids in with_token) > 6


def test_a_denoiser_is_all_that_the_loop_needs_of_a_model(models: DiffusersModels) -> None:
    """Wrapped so that nothing but the protocol's attributes can be reached."""

    class Bare:
        def __init__(self, denoiser: DiffusersDenoiser) -> None:
            names = ("family", "prediction_type", "alphas_cumprod", "device", "dtype", "network")
            for name in names:
                setattr(self, name, getattr(denoiser, name))
            self.projections = dict(reversed(list(denoiser.projections.items())))
            self.predict: Callable[..., Tensor] = denoiser.predict
            self.preview: Callable[..., Tensor] = denoiser.preview

    concept = cat_concept()
    bare: Any = Bare(models.denoiser)
    result = train(config(), [concept], [random_bank(concept)], bare, models.text_encoder)
    assert same_concept(result, trained(models, config()))
