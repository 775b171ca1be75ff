"""A pivotal start against the two trainings that it is: textual inversion, then keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import ConfigError
from custom_diffusion.host.diffusers.lending import DiffusersModels
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.events import CheckpointDue
from custom_diffusion.trainer.loop import train
from support.tiny_models import RESOLUTION, cat_concept, random_bank

CONFIG = TrainConfig(
    steps=3,
    batch_size=2,
    learning_rate=1e-4,
    resolution=RESOLUTION,
    preview_every_steps=0,
    gradient_cut="start and padding",
    word_steps=2,
    word_learning_rate=1e-3,
)


def trained(models: DiffusersModels, settings: TrainConfig, **options: Any) -> Concept:
    concept = cat_concept()
    bank = random_bank(concept)
    return train(settings, [concept], [bank], models.denoiser, models.text_encoder, **options)


def kept(models: DiffusersModels, settings: TrainConfig) -> dict[int, tuple[Any, Concept]]:
    """After every step, copied: what an event brings goes on learning."""
    found: dict[int, tuple[Any, Concept]] = {}

    def keep(event: Any) -> None:
        if isinstance(event, CheckpointDue) and event.concept:
            copied = replace(
                event.checkpoint,
                parameters=tuple(p.clone() for p in event.checkpoint.parameters),
                moments=tuple(
                    {k: v.clone() for k, v in m.items()} for m in event.checkpoint.moments
                ),
            )
            found[event.checkpoint.step] = (copied, event.concept.to(torch.float64))

    found[settings.steps] = (
        None,
        trained(models, settings, on_event=keep, checkpoint_every_steps=1),
    )
    return found


def vector(concept: Concept) -> torch.Tensor:
    return concept.tokens[0].embeddings["clip_l"]


def test_first_the_word_learns_alone_as_in_textual_inversion(models: DiffusersModels) -> None:
    steps = kept(models, CONFIG)
    inversion = replace(CONFIG, method="textual inversion", steps=2, word_steps=0)
    word_alone = trained(models, inversion)
    slow = replace(CONFIG, steps=1, word_steps=0, word_learning_rate=1e-7)
    began = vector(trained(models, slow))
    after_two, after_three = steps[2][1], steps[3][1]
    moved = (vector(word_alone) - began).norm()
    assert (vector(after_two) - vector(word_alone)).norm() < 1e-3 * moved
    assert all(not delta.dense().any() for delta in after_two.deltas.values())
    assert any(delta.dense().any() for delta in after_three.deltas.values())
    assert not torch.equal(vector(after_two), vector(after_three))


def test_a_run_goes_on_from_the_middle_of_its_word_steps_to_the_bit(
    models: DiffusersModels,
) -> None:
    steps = kept(models, CONFIG)
    again = trained(models, CONFIG, checkpoint=steps[1][0])
    whole = steps[3][1]
    assert torch.equal(vector(again), vector(whole))
    for layer, delta in whole.deltas.items():
        assert torch.equal(delta.dense(), again.deltas[layer].dense())


def test_what_cannot_start_with_a_word(models: DiffusersModels) -> None:
    with pytest.raises(ConfigError, match="leaves none of the 3 steps"):
        trained(models, replace(CONFIG, word_steps=3))
    with pytest.raises(ConfigError, match="here none learns"):
        trained(models, replace(CONFIG, method="dreambooth"))
