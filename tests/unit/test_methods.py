"""What each training method changes, against a naive loop, and LoRA against peft's own layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.delta import LowRankDelta
from custom_diffusion.concept.errors import ConfigError, MergeError
from custom_diffusion.concept.file import read_concept, write_concept
from custom_diffusion.concept.layers import is_projection
from custom_diffusion.host.diffusers.lending import DiffusersModels, borrowed_models
from custom_diffusion.host.diffusers.sampling import applied_concept
from custom_diffusion.merge.merging import merge_concepts
from custom_diffusion.trainer.config import MethodName, TrainConfig
from custom_diffusion.trainer.learning.projections import LowRankProjections
from custom_diffusion.trainer.loop import train
from custom_diffusion.trainer.methods import METHODS, recipe
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from support.naive_training import is_key_or_value, layer_of, naive_training
from support.tiny_models import RESOLUTION, cat_concept, random_bank

pytestmark = pytest.mark.slow

QUERIES_AND_OUTPUTS = ("attn2.to_q.weight", "attn2.to_out.0.weight")
# What learns in the UNet, and whether the new word does.
LEARNS: dict[MethodName, tuple[Callable[[str], bool], bool]] = {
    "custom diffusion": (is_key_or_value, True),
    "values only": (lambda n: "attn2.to_v" in n, True),
    "cross-attention": (lambda n: is_key_or_value(n) or n.endswith(QUERIES_AND_OUTPUTS), True),
    "textual inversion": (lambda n: False, True),
    "dreambooth": (lambda n: True, False),
    "fine-tune all": (lambda n: True, True),
}
WHOLE_NETWORK = ("dreambooth", "fine-tune all")


def config(method: MethodName, **changes: Any) -> TrainConfig:
    settings = {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "resolution": RESOLUTION}
    return TrainConfig(method=method, preview_every_steps=0, **{**settings, **changes})


def trained(models: DiffusersModels, settings: TrainConfig, **options: Any) -> Concept:
    concept = cat_concept(2, regularization=2)
    bank = random_bank(concept)
    return train(settings, [concept], [bank], models.denoiser, models.text_encoder, **options)


@pytest.fixture
def own_pipeline(pipeline: StableDiffusionPipeline) -> Iterator[StableDiffusionPipeline]:
    """One that a method may change."""
    own = copy.copy(pipeline)
    own.unet = copy.deepcopy(pipeline.unet)
    yield own


def test_every_method_has_a_name_and_a_recipe() -> None:
    assert set(METHODS) == set(get_args(MethodName)) == {*LEARNS, "low-rank"}
    assert recipe("custom diffusion") == TrainConfig()
    assert recipe("dreambooth").steps == 800 and recipe("dreambooth").learning_rate == 5e-6


@pytest.mark.parametrize("method", LEARNS)
def test_three_steps_equal_those_of_a_naive_loop(
    own_pipeline: StableDiffusionPipeline, method: MethodName
) -> None:
    learns, learns_words = LEARNS[method]
    settings, concept = config(method), cat_concept(2, regularization=2)
    if not METHODS[method].splices:  # what more than keys and values learn cannot be spliced
        settings = replace(settings, gradient_cut="start and padding")
    losses, changes, rows = naive_training(
        own_pipeline, settings, [concept], [random_bank(concept)], learns, learns_words=learns_words
    )
    before = {name: p.detach().clone() for name, p in own_pipeline.unet.named_parameters()}
    with borrowed_models(own_pipeline) as models:
        ours = trained(models, config(method))
    np.testing.assert_allclose(ours.provenance["final_losses"], losses, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.tokens[0].embeddings["clip_l"], rows, atol=1e-5, rtol=1e-3)
    assert ours.provenance["method"] == method

    in_concept = {name for name in changes if "attn2.to_" in name and name.endswith("weight")}
    if method in WHOLE_NETWORK:
        in_concept = {name for name in changes if is_key_or_value(name)}
    assert ours.deltas.keys() == {layer_of(name) for name in in_concept}
    for name, parameter in own_pipeline.unet.named_parameters():
        stayed = changes[name] if name in changes and name not in in_concept else 0
        wanted = before[name] + stayed
        torch.testing.assert_close(parameter, wanted, atol=1e-5, rtol=1e-3)
        assert parameter.requires_grad and parameter.grad is None
    for name in in_concept:
        assert changes[name].any()
        learnt = ours.deltas[layer_of(name)].dense()
        torch.testing.assert_close(learnt, changes[name], atol=1e-5, rtol=1e-3)


def test_a_rank_that_no_layer_has_is_refused(pipeline: StableDiffusionPipeline) -> None:
    with borrowed_models(pipeline) as models:
        assert LowRankProjections(models.denoiser, {}, 32, seed=4).deltas()
        with pytest.raises(ConfigError, match=r"rank=33 is more.* Set a rank of 32 or less"):
            LowRankProjections(models.denoiser, {}, 33, seed=4)


def test_low_rank_factors_learn_as_those_of_peft(pipeline: StableDiffusionPipeline) -> None:
    settings, concept = config("low-rank", rank=3, seed=4), cat_concept(2, regularization=2)
    with borrowed_models(pipeline) as models:
        start = LowRankProjections(models.denoiser, {}, 3, seed=4).deltas()
        ours = trained(models, settings)

    def adapt(unet: Any) -> Any:
        lora = LoraConfig(r=3, lora_alpha=3, target_modules=["attn2.to_k", "attn2.to_v"])
        inject_adapter_in_model(lora, unet)
        for name, parameter in unet.named_parameters():
            if "lora_A" in name:
                delta = start[layer_of(name.split(".lora_A")[0])]
                assert isinstance(delta, LowRankDelta) and not delta.up.any()
                parameter.data = delta.down.clone()
        return unet

    losses, changes, rows = naive_training(
        pipeline, settings, [concept], [random_bank(concept)], lambda n: "lora_" in n, adapt=adapt
    )
    np.testing.assert_allclose(ours.provenance["final_losses"], losses, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.tokens[0].embeddings["clip_l"], rows, atol=1e-5, rtol=1e-3)
    ups = {n.split(".lora_B")[0]: change for n, change in changes.items() if "lora_B" in n}
    assert len(ups) == len(ours.deltas) == 12
    for path, up in ups.items():
        delta = ours.deltas[layer_of(path)]
        assert isinstance(delta, LowRankDelta) and delta.rank == 3
        torch.testing.assert_close(delta.up, up, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("method", ["low-rank", "cross-attention", "textual inversion"])
def test_what_fits_a_concept_is_saved_read_and_applied(
    pipeline: StableDiffusionPipeline, method: MethodName, tmp_path: Any
) -> None:
    before = {name: p.detach().clone() for name, p in pipeline.unet.named_parameters()}
    with borrowed_models(pipeline) as models:
        learnt = trained(models, config(method, rank=2))
    read = read_concept(write_concept(learnt, tmp_path / "cat.safetensors", torch.float32))
    assert read.deltas.keys() == learnt.deltas.keys()
    with applied_concept(pipeline, read):
        changed = {
            layer_of(name)
            for name, parameter in pipeline.unet.named_parameters()
            if not torch.equal(parameter, before[name])
        }
    assert changed == learnt.deltas.keys()
    others = {layer for layer in changed if not is_projection(layer)}
    assert len(others) == (12 if method == "cross-attention" else 0)


def test_more_than_keys_and_values_cannot_be_merged(
    models: DiffusersModels,
) -> None:
    concept = trained(models, config("cross-attention", steps=1))
    with pytest.raises(MergeError, match=r"12 matrices.*'custom diffusion' or 'low-rank'"):
        merge_concepts([concept], models.text_encoder, captions=["a cat"])


def test_methods_that_leave_only_words_in_a_concept_need_one(models: DiffusersModels) -> None:
    moongate = replace(cat_concept(), token="", initializer="")
    bank = random_bank(moongate)
    for method in ("textual inversion", *WHOLE_NETWORK):
        with pytest.raises(ConfigError, match="no concept has a trigger word"):
            train(config(method), [moongate], [bank], models.denoiser, models.text_encoder)


def test_half_precision_weights_learn_small_steps(
    own_pipeline: StableDiffusionPipeline,
) -> None:
    """A step of 1e-5 would be lost in bfloat16; three of them must not be. Nor is the loss one."""
    own_pipeline.unet.to(torch.bfloat16)
    with borrowed_models(own_pipeline) as models:
        learnt = trained(models, config("cross-attention", learning_rate=1e-5))
    losses = torch.tensor(learnt.provenance["final_losses"])
    assert not torch.equal(losses, losses.bfloat16().float())
    queries = [d.dense() for layer, d in learnt.deltas.items() if layer.endswith("to_q")]
    assert queries
    for delta in queries:
        assert 2e-5 < delta.abs().max() < 4e-5
