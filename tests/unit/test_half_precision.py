"""Every method in every precision it allows: each step learns from the weights that the one before
has left, and a training that is interrupted goes on to the bit.
"""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from custom_diffusion.cli.models import DTYPES
from custom_diffusion.concept.concept import Concept
from custom_diffusion.host.diffusers.lending import borrowed_models
from custom_diffusion.trainer.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from custom_diffusion.trainer.config import MethodName, OptimizerName, TrainConfig
from custom_diffusion.trainer.events import CheckpointDue, Event, PreviewDrawn
from custom_diffusion.trainer.loop import train
from diffusers import StableDiffusionPipeline
from support.naive_training import is_key_or_value, layer_of, naive_training
from support.tiny_models import RESOLUTION, cat_concept, random_bank
from torch import Tensor

pytestmark = pytest.mark.slow

METHODS = get_args(MethodName)
OPTIMIZERS = get_args(OptimizerName)
WHOLE_NETWORK = ("dreambooth", "fine-tune all")


def config(method: MethodName, **changes: Any) -> TrainConfig:
    settings = {"batch_size": 4, "learning_rate": 1e-3, "resolution": RESOLUTION, "rank": 2}
    return TrainConfig(method=method, gradient_cut="start and padding", **{**settings, **changes})


def in_precision(pipeline: StableDiffusionPipeline, dtype: torch.dtype) -> StableDiffusionPipeline:
    """A copy as the hosts load one: keys and values keep float32."""
    own = copy.copy(pipeline)
    own.unet = copy.deepcopy(pipeline.unet)
    for name, parameter in own.unet.named_parameters():
        if not is_key_or_value(name):
            parameter.data = parameter.data.to(dtype)
    return own


def trained(
    pipeline: StableDiffusionPipeline, settings: TrainConfig, **options: Any
) -> tuple[Concept, dict[str, Tensor]]:
    """The concept, and the pipeline's UNet afterwards. The pipeline stays as it is."""
    own = copy.copy(pipeline)
    own.unet = copy.deepcopy(pipeline.unet)
    concept = cat_concept(2, regularization=2)
    with borrowed_models(own) as models:
        learnt = train(
            settings,
            [concept],
            [random_bank(concept)],
            models.denoiser,
            models.text_encoder,
            **options,
        )
    return learnt, dict(own.unet.state_dict())


# Fresh weights


def with_fresh_casts(unet: Any) -> Any:
    """Every product casts the weights that are there at that moment."""
    unet.forward = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)(unet.forward)
    return unet


@pytest.mark.parametrize("method", ["custom diffusion", "cross-attention", *WHOLE_NETWORK])
def test_steps_in_bfloat16_equal_those_of_a_naive_loop_and_are_near_those_in_float32(
    pipeline: StableDiffusionPipeline, method: MethodName
) -> None:
    """The loss of each of ten, and what they leave. With casts that are a step old, losses are 5e-3
    to 0.6 away and keys and values 10 to 94 %.

    Two that differ by rounding alone part as far as this too, since Adam makes much of the smallest
    gradients.
    """
    further = ("attn2.to_q.weight", "attn2.to_out.0.weight") if method == "cross-attention" else ()

    def learns(name: str) -> bool:
        return method in WHOLE_NETWORK or is_key_or_value(name) or name.endswith(further)

    half = in_precision(pipeline, torch.bfloat16)
    settings = config(method, steps=10, preview_every_steps=0)
    ours, network = trained(half, settings)
    exact = copy.copy(half)
    exact.unet = copy.deepcopy(half.unet).float()
    concept = cat_concept(2, regularization=2)
    (losses, changes, _), (exact_losses, _, _) = (
        naive_training(
            exact,
            settings,
            [concept],
            [random_bank(concept)],
            learns,
            learns_words=method != "dreambooth",
            adapt=adapt,
        )
        for adapt in (with_fresh_casts, lambda unet: unet)
    )
    np.testing.assert_allclose(ours.provenance["final_losses"], losses, atol=3e-3, rtol=0)
    np.testing.assert_allclose(ours.provenance["final_losses"], exact_losses, atol=4.5e-3, rtol=0)
    kept = {name: layer for name in changes if (layer := _layer(name)) in ours.deltas}
    learnt = torch.cat([ours.deltas[layer].dense().flatten() for layer in kept.values()])
    judge = torch.cat([changes[name].flatten() for name in kept])
    assert kept and (learnt - judge).norm() < 0.09 * judge.norm()
    if method in WHOLE_NETWORK:  # what learns beside them is stored in half precision again
        began = exact.unet.state_dict()
        others = [name for name in changes if name not in kept]
        moved = torch.cat([(network[n].float() - began[n]).flatten() for n in others])
        judge = torch.cat([changes[name].flatten() for name in others])
        assert (moved - judge).norm() < 0.25 * judge.norm()


def _layer(name: str) -> str | None:
    return layer_of(name) if "attn2.to_" in name and name.endswith("weight") else None


# Going on


def each(method: MethodName, optimizer: OptimizerName, dtype: str) -> Any:
    """What a method does beside the optimizer's and the precision's calls, all versions do."""
    marks = [] if method in ("custom diffusion", "dreambooth") else [pytest.mark.any_version]
    return pytest.param(method, optimizer, dtype, marks=marks)


@pytest.mark.parametrize(
    ("method", "optimizer", "dtype"),
    [each(*one) for one in product(METHODS, OPTIMIZERS, DTYPES)],
)
def test_every_training_goes_on_to_the_bit(
    pipeline: StableDiffusionPipeline,
    method: MethodName,
    optimizer: OptimizerName,
    dtype: str,
    tmp_path: Path,
) -> None:
    """From the file of a checkpoint, with previews before and after it."""
    own = in_precision(pipeline, DTYPES[dtype])
    settings = config(method, steps=4, optimizer=optimizer, preview_every_steps=2)
    previews: dict[int, list[Tensor]] = {}

    def keep(event: Event) -> None:
        if isinstance(event, CheckpointDue) and event.checkpoint.step == 2:
            write_checkpoint(event.checkpoint, tmp_path / "checkpoint.safetensors")
        if isinstance(event, PreviewDrawn):
            previews.setdefault(event.step, []).append(event.image_hwc)

    def learnt(checkpoint: Checkpoint | None) -> dict[str, Tensor]:
        concept, network = trained(
            own, settings, checkpoint=checkpoint, checkpoint_every_steps=2, on_event=keep
        )
        deltas = {layer: delta.dense() for layer, delta in concept.deltas.items()}
        losses = torch.tensor(concept.provenance["final_losses"])
        return {**network, **deltas, "word": concept.tokens[0].embeddings["clip_l"], "loss": losses}

    whole = learnt(None)
    went_on = learnt(read_checkpoint(tmp_path / "checkpoint.safetensors"))
    assert whole.keys() == went_on.keys()
    different = [name for name in whole if not torch.equal(whole[name], went_on[name])]
    assert not different
    assert {step: len(pictures) for step, pictures in previews.items()} == {2: 1, 4: 2}
    assert torch.equal(*previews[4])
    assert len(set(whole["loss"].tolist())) == 4
