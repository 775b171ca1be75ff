"""A real training of the tiny pipeline, for jobs, and a comparison of what two have learnt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from custom_diffusion.concept.concept import Concept
from custom_diffusion.host.diffusers.lending import borrowed_models
from custom_diffusion.trainer.checkpoint import Checkpoint
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.events import Event
from custom_diffusion.trainer.loop import train
from diffusers import StableDiffusionPipeline

from .tiny_models import cat_concept, random_bank


def train_cat(
    pipeline: StableDiffusionPipeline,
    config: TrainConfig,
    checkpoint_every_steps: int,
    checkpoint: Checkpoint | None,
    should_stop: Callable[[], bool],
    on_event: Callable[[Event], None],
) -> Concept:
    concept = cat_concept()
    with borrowed_models(pipeline) as models:
        return train(
            config,
            [concept],
            [random_bank(concept)],
            models.denoiser,
            models.text_encoder,
            checkpoint=checkpoint,
            checkpoint_every_steps=checkpoint_every_steps,
            should_stop=should_stop,
            on_event=on_event,
        )


def assert_same_but_for_rounding(one: Concept, other: Concept) -> None:
    """By norm: Adam makes much of what rounding does to the smallest gradients."""
    tokens = zip(one.tokens, other.tokens, strict=True)
    pairs = [(a.embeddings["clip_l"], b.embeddings["clip_l"]) for a, b in tokens]
    pairs += [(delta.dense(), other.deltas[layer].dense()) for layer, delta in one.deltas.items()]
    for wanted, got in pairs:
        assert (got - wanted).norm() < 1e-3 * wanted.norm()
    losses = other.provenance["final_losses"]
    assert one.provenance["final_losses"] == pytest.approx(losses, rel=1e-4)
