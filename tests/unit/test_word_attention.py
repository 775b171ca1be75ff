"""Words kept inside their masks, against sums over every place, head and layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from custom_diffusion.concept.errors import ConfigError
from custom_diffusion.host.diffusers.lending import DiffusersModels, borrowed_models
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.data.batches import Batch
from custom_diffusion.trainer.data.latents import LatentBank
from custom_diffusion.trainer.economy.backward import Backward
from custom_diffusion.trainer.learner import Learner
from custom_diffusion.trainer.learning.samples import Samples, drawn_noise, samples_of
from custom_diffusion.trainer.loop import train
from custom_diffusion.trainer.request import TrainingRequest
from custom_diffusion.trainer.teach import prepared
from support.tiny_models import (
    LATENT_EDGE,
    RESOLUTION,
    cat_concept,
    dog_concept,
    random_bank,
    tiny_pipeline,
    tiny_xl_pipeline,
)
from torch import Tensor

CONFIG = TrainConfig(
    attention_weight=0.5, batch_size=2, resolution=RESOLUTION, learning_rate=1e-2, steps=3
)
CONCEPTS = [cat_concept(), dog_concept()]
LEFT, TOP = torch.zeros(LATENT_EDGE, LATENT_EDGE), torch.zeros(LATENT_EDGE, LATENT_EDGE)
LEFT[:, :3], TOP[:2, :] = 1, 0.5
PROMPTS = ("a <new1> cat and a <new2> dog", "photo of a <new1> thing")
# Token and noun of both; a noun counts only behind its trigger word. 0 is the start of the text.
PLACES: list[list[tuple[int, Tensor]]] = [
    [(2, LEFT), (3, LEFT), (6, TOP), (7, TOP)],
    [(4, TOP)],
]
BATCH = Batch(
    latents_bchw=torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    masks_bhw=torch.ones(2, LATENT_EDGE, LATENT_EDGE),
    prompts=PROMPTS,
    sizes=torch.tensor([[RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION]] * 2),
    prior=0,
    subject_masks=({"<new1> cat": LEFT, "<new2> dog": TOP}, {"<new1> cat": TOP}),
)


@pytest.fixture(params=[tiny_pipeline, tiny_xl_pipeline], ids=["sd15", "sdxl"])
def models(request: pytest.FixtureRequest) -> Iterator[DiffusersModels]:
    with borrowed_models(request.param()) as lent:
        yield lent


def samples_for(learner: Learner, models: DiffusersModels) -> Samples:
    text = learner.prompts.encode(BATCH.prompts).as_leaves()
    drawn = drawn_noise(BATCH, torch.Generator().manual_seed(1), models.denoiser, CONFIG)
    places = learner.places(BATCH, text.features.context)
    return samples_of(BATCH, *drawn, text, models.denoiser, CONFIG, places)


def by_hand(caught: list[tuple[Any, Tensor, Tensor]]) -> Tensor:
    """The mean of the samples' terms, from what every cross-attention computes with."""
    terms = []
    for sample, words in enumerate(PLACES):
        each = []
        for position, mask in words:
            levels: dict[int, list[Tensor]] = {}
            for module, queries, keys in caught:
                width = queries.shape[-1] // module.heads
                for head in range(module.heads):
                    part = slice(head * width, (head + 1) * width)
                    scores = queries[sample, :, part] @ keys[sample, :, part].T / math.sqrt(width)
                    exact = scores.double().exp()
                    share = exact[:, position] / exact.sum(1)
                    levels.setdefault(len(share), []).append(share)
            for places, shares in levels.items():
                edge = math.isqrt(places)
                block = LATENT_EDGE // edge
                share = torch.stack(shares).mean(0).view(edge, edge)
                total, weight = torch.zeros((), dtype=torch.float64), 0.0
                for y in range(edge):
                    for x in range(edge):
                        inside = mask[block * y : block * (y + 1), block * x : block * (x + 1)]
                        outside = 1 - float(inside.mean())
                        total = total + share[y, x] / share.max() * outside
                        weight += outside
                each.append(total / weight)
        terms.append(torch.stack(each).mean())
    return torch.stack(terms).mean()


def test_the_term_and_its_gradient_are_those_of_a_sum_by_hand(models: DiffusersModels) -> None:
    learner = Learner(CONFIG, CONCEPTS, None, models.denoiser, models.text_encoder)
    samples = samples_for(learner, models)
    plain = replace(samples, word_rows=None, word_masks=None)
    network = models.denoiser.network
    caught: list[tuple[Any, Tensor, Tensor]] = []
    with learner.learning():
        (weight,) = learner.projections.parameters()
        ours = learner.loss_of(samples) - learner.loss_of(plain)
        ours.backward()
        gradient = weight.grad

        handles = [
            module.register_forward_hook(
                lambda module, inputs, named, _: caught.append(
                    (module, module.to_q(inputs[0]), module.to_k(named["encoder_hidden_states"]))
                ),
                with_kwargs=True,
            )
            for name, module in network.named_modules()
            if name.endswith(".attn2")
        ]
        learner.loss_of(plain)
        for handle in handles:
            handle.remove()
        weight.grad = None
        wanted = CONFIG.attention_weight * by_hand(caught)
        wanted.backward()
    assert len(caught) in (6, 12) and float(wanted) > 0.1
    assert float(ours) == pytest.approx(float(wanted), rel=1e-5)
    assert gradient is not None and weight.grad is not None
    scale = float(weight.grad.abs().max())
    assert scale > 0
    torch.testing.assert_close(gradient, weight.grad, atol=1e-4 * scale, rtol=1e-3)


def test_parts_of_a_batch_and_recomputed_blocks_give_the_same(models: DiffusersModels) -> None:
    found = []
    for at_once, recomputing in ((0, False), (1, False), (1, True)):
        learner = Learner(CONFIG, CONCEPTS, None, models.denoiser, models.text_encoder)
        samples = samples_for(learner, models)
        backward = Backward(models.denoiser, at_once, recomputing, lambda *_: None)
        with learner.learning():
            loss = backward(learner.loss_of, samples, learner.parameters)
            (weight,) = learner.projections.parameters()
            assert weight.grad is not None
            found.append((loss, weight.grad.clone()))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-6, rtol=1e-3)


def masked_bank(concept: Any) -> LatentBank:
    bank = random_bank(concept)
    views = tuple(
        tuple(replace(view, subject_masks={concept.subject: LEFT}) for view in of_picture)
        for of_picture in bank.instances
    )
    return replace(bank, instances=views)


def test_a_training_with_it_makes_words_look_inside() -> None:
    with borrowed_models(tiny_pipeline()) as models:
        beside = {}
        for weight in (0.0, 10.0):
            settings = replace(CONFIG, attention_weight=weight, steps=12, preview_every_steps=0)
            banks = [masked_bank(concept) for concept in CONCEPTS]
            both = models.denoiser, models.text_encoder
            concept = train(settings, CONCEPTS, banks, *both)
            settings = replace(CONFIG, attention_weight=1.0)
            learner = Learner(settings, CONCEPTS, concept, *both)
            samples = samples_for(learner, models)
            with learner.learning(), torch.no_grad():
                plain = learner.loss_of(replace(samples, word_rows=None, word_masks=None))
                beside[weight] = float(learner.loss_of(samples) - plain)
    assert beside[10.0] < 0.9 * beside[0.0]
    assert np.isfinite(list(beside.values())).all()


def test_without_masks_it_is_refused_before_anything_is_encoded() -> None:
    with borrowed_models(tiny_pipeline()) as models:
        parts = models.denoiser, models.text_encoder, models.latent_encoder
        with pytest.raises(ConfigError, match="no picture has a mask"):
            prepared(TrainingRequest(CONFIG, CONCEPTS), *parts)
