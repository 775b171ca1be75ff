"""Pictures that are kept back: what is measured on them against diffusers, what they leave alone,
and when a run ends by them.
"""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import CheckpointError, ConfigError
from custom_diffusion.concept.layers import layer_from_diffusers
from custom_diffusion.host.diffusers.lending import DiffusersModels
from custom_diffusion.trainer.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.data.latents import LatentBank, encode_views, kept_back
from custom_diffusion.trainer.events import CheckpointDue, Event, NoLongerBetter, StepDone
from custom_diffusion.trainer.loop import train
from custom_diffusion.trainer.prepare import prepare
from custom_diffusion.trainer.validation import best_step, fallen_until
from diffusers import StableDiffusionPipeline
from support.naive_training import tokenizer_that_knows
from support.tiny_models import RESOLUTION, VOCABULARY_SIZE, cat_concept, random_bank
from torch import Tensor

pytestmark = pytest.mark.slow

CONCEPT = cat_concept(images=3)


def bank(kept: int = 1) -> LatentBank:
    """Of three pictures, the last of which are kept back."""
    whole = random_bank(CONCEPT)
    taught = len(whole.instances) - kept
    return replace(whole, instances=whole.instances[:taught], kept_back=whole.instances[taught:])


def config(**changes: Any) -> TrainConfig:
    settings = {
        "steps": 4,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "resolution": RESOLUTION,
        "preview_every_steps": 0,
        "validation_pictures": 1,
        "validation_every_steps": 1,
    }
    return TrainConfig(**{**settings, **changes})


def run(models: DiffusersModels, settings: TrainConfig, **options: Any) -> list[Event]:
    """The events, and last the concept."""
    events: list[Any] = []
    options = {"bank": bank(), **options}
    concept = train(
        settings,
        [CONCEPT],
        [options.pop("bank")],
        models.denoiser,
        models.text_encoder,
        on_event=lambda event: events.append(kept(event)),
        **options,
    )
    return [*events, concept]


def kept(event: Event) -> Event:
    """With tensors that the run goes on changing as they are now."""
    return copy.deepcopy(event) if isinstance(event, CheckpointDue) else event


def measured(events: list[Any]) -> dict[int, float]:
    steps = [event for event in events if isinstance(event, StepDone)]
    return {event.step: event.validation for event in steps if event.validation is not None}


def losses(events: list[Any]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepDone)]


def tensors(concept: Concept) -> list[Tensor]:
    deltas = [concept.deltas[layer].dense() for layer in concept.layers]
    return [*deltas, concept.tokens[0].embeddings["clip_l"]]


def same(one: Concept, other: Concept) -> bool:
    return all(map(torch.equal, tensors(one), tensors(other)))


def by_diffusers(
    pipeline: StableDiffusionPipeline, concept: Concept, settings: TrainConfig
) -> float:
    """The validation loss of a concept, sample by sample, with plain modules."""
    unet = copy.deepcopy(pipeline.unet)
    text_model = copy.deepcopy(pipeline.text_encoder)
    tokenizer = tokenizer_that_knows([CONCEPT], pipeline.tokenizer)
    text_model.resize_token_embeddings(VOCABULARY_SIZE + 1, mean_resizing=False)
    table = text_model.get_input_embeddings().weight
    table.data[VOCABULARY_SIZE] = concept.tokens[0].embeddings["clip_l"][0]
    own = torch.zeros(1, 77, 1, dtype=torch.bool)
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            change = concept.deltas[layer_from_diffusers(name)].dense()

            def learnt(_: Any, inputs: Any, out: Tensor, change: Tensor = change) -> Tensor:
                changed = out + inputs[0] @ change.T
                return torch.where(own, changed, out)

            module.register_forward_hook(learnt)
    pictures = bank().kept_back
    count = 16 * len(pictures)

    def noise(of: str) -> Tensor:
        seed = random.Random(f"{settings.seed} validation {of}").getrandbits(32)
        return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))

    latents_noise, added = noise("latents"), noise("noise")
    total = 0.0
    for number in range(count):
        views = pictures[number % len(pictures)]
        view = views[number // len(pictures) % len(views)]
        timestep = torch.tensor([int((number + 0.5) * 1000 / count)])
        tokens = tokenizer(view.prompt, padding="max_length", max_length=77, return_tensors="pt")
        ids = tokens.input_ids[0].tolist()
        own.fill_(settings.gradient_cut != "own words")
        for place in range(76):  # the new word, and the noun after it
            if ids[place] == VOCABULARY_SIZE:
                own[0, place : place + 2] = True
        with torch.no_grad():
            context = text_model(tokens.input_ids).last_hidden_state
            latents = (view.mean + view.deviation * latents_noise[number])[None]
            noisy = pipeline.scheduler.add_noise(latents, added[number][None], timestep)
            output = unet(noisy, timestep, context).sample
        error = ((output - added[number]) ** 2).mean(1)[0]
        total += float((error * view.mask).sum() / view.mask.sum())
    return total / count


@pytest.mark.parametrize("cut", ["start", "own words"])
def test_what_is_measured_is_what_diffusers_gives(
    pipeline: StableDiffusionPipeline, models: DiffusersModels, cut: Any
) -> None:
    settings = config(gradient_cut=cut, steps=3)
    events = run(models, settings, checkpoint_every_steps=1)
    concepts = [event.concept for event in events if isinstance(event, CheckpointDue)]
    expected = {
        step: by_diffusers(pipeline, concept, settings)
        for step, concept in enumerate(concepts, start=1)
        if concept
    }
    got = measured(events)
    assert list(got) == [1, 2, 3] and len(set(got.values())) == 3
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)


def test_what_is_learnt_lacks_nothing_but_the_picture_that_is_kept_back(
    models: DiffusersModels,
) -> None:
    """To the bit: no random number is another, whether one measures or not."""
    watched = run(models, config())
    without = replace(bank(), kept_back=())
    plain = run(models, config(validation_pictures=0), bank=without)
    assert measured(plain) == {} and len(measured(watched)) == 4
    assert losses(watched) == losses(plain)
    assert same(watched[-1], plain[-1])


def test_views_of_the_others_are_what_they_are_without(models: DiffusersModels) -> None:
    settings = config(seed=3)
    banks = {
        pictures: encode_views(
            CONCEPT, models.latent_encoder, replace(settings, validation_pictures=pictures)
        )
        for pictures in (0, 1)
    }
    (back,) = kept_back(settings, 3)
    assert banks[0].kept_back == ()
    others = [views for place, views in enumerate(banks[0].instances) if place != back]
    for before, after in (
        *zip(others, banks[1].instances, strict=True),
        (banks[0].instances[back], banks[1].kept_back[0]),
    ):
        assert [view.prompt for view in before] == [view.prompt for view in after]
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one.mean, other.mean) and torch.equal(one.mask, other.mask)
    assert {kept_back(config(seed=seed), 3)[0] for seed in range(20)} == {0, 1, 2}


def test_keeping_back_all_there_is_is_refused(models: DiffusersModels) -> None:
    with pytest.raises(ConfigError, match=r"validation_pictures=3 leaves nothing .* 3 pictures"):
        prepare(
            CONCEPT,
            config(validation_pictures=3),
            models.latent_encoder,
            models.text_encoder,
        )


# The end of a run

FALLING = {50: 0.30, 100: 0.20, 150: 0.19999, 200: 0.25, 250: 0.21}


def test_the_best_step_is_the_lowest_and_what_is_flat_is_not_lower() -> None:
    assert best_step(FALLING) == 150 and fallen_until(FALLING) == 100
    assert best_step({50: 0.1, 100: 0.1}) == 50 == fallen_until({50: 0.1, 100: 0.1})
    slowly = {step: 1 - step / 2000 for step in range(1, 30)}  # each within what is flat
    assert fallen_until(slowly) > 26


RISING = {"learning_rate": 0.1, "steps": 12, "patience_steps": 1}
"""So fast that the loss on what was not seen rises after one of the first steps"""


def test_a_rising_loss_ends_a_run_with_what_was_best(models: DiffusersModels) -> None:
    events = run(models, config(early_stopping="on", **RISING), checkpoint_every_steps=1)
    got, result = measured(events), events[-1]
    (told,) = (event for event in events if isinstance(event, NoLongerBetter))
    best, last = min(got, key=lambda step: got[step]), max(got)
    assert best < last < 12 and last - fallen_until(got) == 1
    assert (told.step, told.best_step, told.stops) == (last, best, True)
    assert f"keeps what it had learnt at step {best}" in told.text()
    assert result.provenance["steps"] == best
    due = [event for event in events if isinstance(event, CheckpointDue)]
    concept = due[best - 1].concept
    assert concept and same(result, concept) and not same(result, due[-1].concept)
    suggested = run(models, config(early_stopping="suggested", **RISING))
    assert len(losses(suggested)) == 12 and losses(suggested)[:last] == losses(events)
    told, *_ = (event for event in suggested if isinstance(event, NoLongerBetter))
    assert (told.step, told.stops) == (last, False)
    assert "More steps are unlikely to help" in told.text()
    off = run(models, config(early_stopping="off", **RISING))
    assert not [event for event in off if isinstance(event, NoLongerBetter)]
    assert same(off[-1], suggested[-1])


def test_a_run_that_was_interrupted_ends_as_it_would_have(
    models: DiffusersModels, tmp_path: Any
) -> None:
    """Wherever it was: before the best step, after it, and when it should have ended."""
    settings = config(early_stopping="on", **RISING)
    whole = run(models, settings, checkpoint_every_steps=1)
    due = [event.checkpoint for event in whole if isinstance(event, CheckpointDue)]
    for number, checkpoint in enumerate(due):
        file = tmp_path / f"{number}.safetensors"
        write_checkpoint(checkpoint, file)
        again = run(models, settings, checkpoint=read_checkpoint(file))
        assert losses(again) == losses(whole)[number + 1 :]
        assert measured(again) == {s: v for s, v in measured(whole).items() if s > number + 1}
        assert same(again[-1], whole[-1])
        assert again[-1].provenance["final_losses"] == whole[-1].provenance["final_losses"]


def test_a_run_that_is_now_to_end_early_does_not_end_with_what_nobody_kept(
    models: DiffusersModels,
) -> None:
    before = run(models, config(early_stopping="suggested", **RISING), checkpoint_every_steps=12)
    (due,) = (event for event in before if isinstance(event, CheckpointDue))
    assert due.checkpoint.best == () and len(due.checkpoint.validation) == 12
    more = config(early_stopping="on", **{**RISING, "steps": 20})
    after = run(models, more, checkpoint=due.checkpoint)
    assert measured(after) and after[-1].provenance["steps"] > 12


@pytest.mark.parametrize(
    ("pairs", "message"),
    [([[5, 0.5]], "of no step"), ([[1, float("nan")]], "not finite"), ([1.0], "is torch.float64")],
)
def test_measurements_of_a_damaged_checkpoint_are_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, pairs: Any, message: str
) -> None:
    from custom_diffusion.trainer import checkpoint as module

    file = tmp_path / "a.safetensors"
    monkeypatch.setattr(module, "_digest", lambda *_: "")
    good = Checkpoint(losses=(0.5,), parameters=(), moments=(), validation={1: 0.5})
    write_checkpoint(good, file)
    assert read_checkpoint(file).validation == {1: 0.5}
    tensors, metadata = module.read_tensors(file)
    tensors["validation"] = torch.tensor(pairs, dtype=torch.float64)
    module.save_file(dict(tensors), file, metadata)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(file)
