"""A concept whose keys do not change goes wherever one goes whose keys do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from custom_diffusion.composition.routing import Route
from custom_diffusion.compression.ranks import compress
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.file import read_concept, write_concept
from custom_diffusion.formats.base import BaseModel
from custom_diffusion.formats.exporting import FORMATS, export_concept
from custom_diffusion.formats.importing import open_concept
from custom_diffusion.host.clip.chunks import encode_prompts
from custom_diffusion.host.diffusers.lending import borrowed_models, text_encoder
from custom_diffusion.host.diffusers.routing import route, routing
from custom_diffusion.merge.merging import merge_concepts
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.loop import train
from diffusers import StableDiffusionPipeline
from support.made_concepts import concept_for
from support.tiny_models import RESOLUTION, cat_concept, random_bank, tiny_pipeline

LATENTS = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TIMESTEP = torch.tensor([500])
CAPTIONS = [f"a {noun} number {number}" for noun in ("cat", "dog") for number in range(40)]


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return tiny_pipeline()


def taught(pipeline: StableDiffusionPipeline, earlier: Concept | None = None) -> Concept:
    config = TrainConfig(
        method="values only", steps=2, batch_size=2, learning_rate=1e-3, resolution=RESOLUTION
    )
    concept = cat_concept()
    with borrowed_models(pipeline) as models:
        banks = [random_bank(concept)]
        models_ = models.denoiser, models.text_encoder
        return train(config, [concept], banks, *models_, earlier=earlier)


@pytest.fixture(scope="module")
def concept(pipeline: StableDiffusionPipeline) -> Concept:
    return taught(pipeline)


def test_only_values_are_in_it(pipeline: StableDiffusionPipeline, concept: Concept) -> None:
    assert {layer.rpartition(".")[2] for layer in concept.deltas} == {"to_v"}
    assert concept.scope == "own words" and len(concept.deltas) == 6
    assert all(delta.dense().any() for delta in concept.deltas.values())


@torch.no_grad()
def test_it_is_routed_as_it_was_trained(
    pipeline: StableDiffusionPipeline, concept: Concept
) -> None:
    encoder = text_encoder(pipeline).with_tokens(concept.embeddings())
    context = encode_prompts(encoder, ["photo of a <new1> cat"]).context
    wanted = pipeline.unet(LATENTS, TIMESTEP, encoder_hidden_states=context).sample
    with routing(pipeline) as router:
        route(router, [Route(concept)], encoder, ["photo of a <new1> cat"], context)
        routed = pipeline.unet(LATENTS, TIMESTEP, encoder_hidden_states=context).sample
    assert not torch.equal(routed, wanted)

    handles = []
    for name, module in pipeline.unet.named_modules():  # the sum by hand, at positions 4 and 5
        if name.endswith("attn2.to_v"):
            layer = BaseModel.of([(f"{name}.weight", module.weight)]).weights
            delta = concept.deltas[next(iter(layer))].dense()
            rows = torch.zeros(77, 1)
            rows[4:6] = 1
            handles.append(
                module.register_forward_hook(
                    lambda _, inputs, out, d=delta, r=rows: out + r * (inputs[0] @ d.T)
                )
            )
    by_hand = pipeline.unet(LATENTS, TIMESTEP, encoder_hidden_states=context).sample
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(routed, by_hand, atol=1e-5, rtol=1e-4)


def test_it_merges_with_one_that_changes_keys(
    pipeline: StableDiffusionPipeline, concept: Concept
) -> None:
    encoder = text_encoder(pipeline)
    dog = concept_for(pipeline, "<new2>", "dog", 2)
    merged, report = merge_concepts([concept, dog], encoder, captions=CAPTIONS, relative_ridge=1e-2)
    assert max(report.residuals) < 0.05
    knows = encoder.with_tokens(merged.embeddings())
    ids = knows.tokenize("<new1> cat")
    with torch.no_grad():
        row = knows.encode(knows.pad([ids]))[0, 1:2]
    for layer, delta in merged.deltas.items():
        size = float(delta.map_rows(row).norm())
        asked = dog.deltas[layer].map_rows(row).norm()
        if layer.endswith("to_k"):  # the dog's keys are not asked for at the cat's word
            assert size < 0.05 * asked


def test_it_is_compressed_saved_and_exported(
    pipeline: StableDiffusionPipeline, concept: Concept, tmp_path: Path
) -> None:
    small, _ = compress(concept, rank=4)
    assert small.deltas.keys() == concept.deltas.keys()
    read = read_concept(write_concept(small, tmp_path / "small.safetensors", torch.float32))
    assert read.deltas.keys() == concept.deltas.keys()
    base = BaseModel.of(pipeline.unet.named_parameters())
    for kind in FORMATS:
        (tmp_path / kind).mkdir()
        (file, *_) = export_concept(small, tmp_path / kind / "cat", kind, base)
        if kind == "embeddings":
            continue
        again = open_concept(file, base).concept
        for layer in concept.deltas:
            wanted = small.deltas[layer].dense()
            torch.testing.assert_close(again.deltas[layer].dense(), wanted, atol=2e-4, rtol=1e-2)


def test_keys_learnt_before_stay_as_they_are(pipeline: StableDiffusionPipeline) -> None:
    first = concept_for(pipeline, "<new1>", "cat", 3)
    more = taught(pipeline, first)
    for layer, delta in first.deltas.items():
        same = torch.equal(more.deltas[layer].dense(), delta.dense())
        assert same == layer.endswith("to_k"), layer
