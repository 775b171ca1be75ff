"""Stable Diffusion XL on a tiny diffusers pipeline: diffusers, transformers and plain loops are the
judges.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import IncompatibleModelError, TokenError
from custom_diffusion.concept.file import read_concept, write_concept
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.concept.text import encode_unpadded
from custom_diffusion.host.clip.pair import ClipTextEncoderPair
from custom_diffusion.host.clip.text_encoder import ClipTextEncoder
from custom_diffusion.host.diffusers.denoiser import DiffusersDenoiser
from custom_diffusion.host.diffusers.lending import DiffusersModels, borrowed_models, text_encoder
from custom_diffusion.host.diffusers.loading import load_pipeline
from custom_diffusion.host.diffusers.sampling import applied_concept, sample
from custom_diffusion.merge.merging import merge_concepts
from custom_diffusion.trainer.config import GradientCut, TrainConfig
from custom_diffusion.trainer.data.training_concept import TrainingConcept
from custom_diffusion.trainer.events import PreviewDrawn
from custom_diffusion.trainer.loop import train
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from support.naive_training import layer_of, naive_training
from support.tiny_models import (
    RESOLUTION,
    VOCABULARY_SIZE,
    XL_CONTEXT_WIDTH,
    XL_POOLED_WIDTH,
    cat_concept,
    dog_concept,
    random_bank,
    requires_grad_map,
    same_state,
    sd_scheduler,
    state,
    tiny_vae,
)
from torch import Tensor

pytestmark = pytest.mark.slow

START, END = 49406, 49407
PROMPTS = ["", "photo of a cat", "a cat! and a dog", "cat dog " * 50]
WIDTHS = {"clip_l": 768, "clip_g": XL_POOLED_WIDTH}


@pytest.fixture
def models(xl_pipeline: StableDiffusionXLPipeline) -> Iterator[DiffusersModels]:
    with borrowed_models(xl_pipeline) as borrowed:
        yield borrowed


@pytest.fixture
def encoder(models: DiffusersModels) -> ClipTextEncoderPair:
    assert isinstance(models.text_encoder, ClipTextEncoderPair)
    return models.text_encoder


def config(**changes: object) -> TrainConfig:
    settings: dict[str, object] = {
        "steps": 3, "batch_size": 4, "learning_rate": 1e-3, "resolution": RESOLUTION,
        "preview_every_steps": 0,
    }  # fmt: skip
    return TrainConfig(**{**settings, **changes})  # type: ignore[arg-type]


def trained(models: DiffusersModels, settings: TrainConfig, concept: TrainingConcept) -> Concept:
    bank = random_bank(concept)
    return train(settings, [concept], [bank], models.denoiser, models.text_encoder)


def word(count: int = 1, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {"<new1>": torch.randn(count, width, generator=generator) / 50}
        for name, width in WIDTHS.items()
    }


def rows_of(concept: Concept) -> Tensor:
    """Both embeddings of each token, side by side."""
    return torch.cat(
        [torch.cat([token.embeddings[name] for name in WIDTHS], 1) for token in concept.tokens]
    )


# Text


@torch.no_grad()
def test_features_and_pooled_are_those_of_the_diffusers_pipeline(
    xl_pipeline: StableDiffusionXLPipeline, encoder: ClipTextEncoderPair
) -> None:
    ids = encoder.pad([encoder.tokenize(prompt) for prompt in PROMPTS])
    context, pooled = encoder.encode_with_pooled(ids)
    wanted, _, wanted_pooled, _ = xl_pipeline.encode_prompt(
        PROMPTS, device="cpu", do_classifier_free_guidance=False
    )
    assert context.shape == (len(PROMPTS), 77, encoder.context_width)
    assert encoder.context_width == XL_CONTEXT_WIDTH
    torch.testing.assert_close(context, wanted, atol=1e-5, rtol=1e-5)
    assert pooled is not None
    torch.testing.assert_close(pooled, wanted_pooled, atol=1e-5, rtol=1e-5)
    assert torch.equal(encoder.encode(ids), context)


def test_each_encoder_is_padded_in_its_own_way(encoder: ClipTextEncoderPair) -> None:
    ids = encoder.pad([encoder.tokenize("cat"), encoder.tokenize("")])
    assert ids.shape == (2, 2, 77)
    assert ids[0, 0].tolist() == [START, 2368, END] + [END] * 74
    assert ids[0, 1].tolist() == [START, 2368, END] + [0] * 74
    assert ids[1, :, :2].tolist() == [[START, END]] * 2


@torch.no_grad()
def test_new_words_are_those_of_models_whose_vocabularies_have_them(
    xl_pipeline: StableDiffusionXLPipeline, encoder: ClipTextEncoderPair
) -> None:
    """The pooled feature is that of the end of text, though the new words have higher ids."""
    embeddings = word(count=2)
    larger = []
    for name, model in zip(
        WIDTHS, (xl_pipeline.text_encoder, xl_pipeline.text_encoder_2), strict=True
    ):
        model = copy.deepcopy(model)
        model.resize_token_embeddings(VOCABULARY_SIZE + 2, mean_resizing=False)
        model.get_input_embeddings().weight[VOCABULARY_SIZE:] = embeddings[name]["<new1>"]
        larger.append(model)
    known = encoder.with_tokens(embeddings)
    ids = known.pad([known.tokenize("photo of a <new1> cat"), known.tokenize("<new1>")])
    assert (ids >= VOCABULARY_SIZE).sum() == 8
    first, second = (model(ids[:, n], output_hidden_states=True) for n, model in enumerate(larger))
    context, pooled = known.encode_with_pooled(ids)
    wanted = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    torch.testing.assert_close(context, wanted, atol=1e-5, rtol=1e-5)
    assert pooled is not None
    torch.testing.assert_close(pooled, second.text_embeds, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_does_not_change_the_words_before_it(encoder: ClipTextEncoderPair) -> None:
    known = encoder.with_tokens(word())
    ids = [known.tokenize(prompt) for prompt in [*PROMPTS, "photo of a <new1> cat"]]
    padded = known.encode(known.pad(ids))
    for short, long in zip(encode_unpadded(known, ids, 2), padded, strict=True):
        torch.testing.assert_close(short, long[: len(short)], atol=1e-5, rtol=1e-5)


def test_gradients_of_both_features_reach_the_words_of_both_encoders(
    encoder: ClipTextEncoderPair,
) -> None:
    for part, reached in (("context", {"clip_l", "clip_g"}), ("pooled", {"clip_g"})):
        embeddings = word()
        rows = {name: rows["<new1>"].requires_grad_(True) for name, rows in embeddings.items()}
        known = encoder.with_tokens(embeddings)
        features = known.encode_with_pooled(known.pad([known.tokenize("a <new1> cat")]))
        getattr(features, part).square().sum().backward()
        assert {name for name, row in rows.items() if row.grad is not None} == reached
        assert all(rows[name].grad.any() for name in reached)  # type: ignore[union-attr]


def test_both_encoders_compute_products_in_half_precision(
    xl_pipeline: StableDiffusionXLPipeline,
) -> None:
    with borrowed_models(copy.deepcopy(xl_pipeline)) as models:
        encoder = models.text_encoder
        ids = encoder.pad([encoder.tokenize(prompt) for prompt in PROMPTS])
        exact = encoder.encode_with_pooled(ids)
        encoder.to(torch.device("cpu"), torch.bfloat16)
        ours = encoder.encode_with_pooled(ids)
    assert exact.pooled is not None
    assert ours.pooled is not None
    width = models.denoiser.family.context_width - XL_POOLED_WIDTH
    for right, own in (
        (exact.context[..., :width], ours.context[..., :width]),
        (exact.context[..., width:], ours.context[..., width:]),
        (exact.pooled, ours.pooled),
    ):
        assert own.dtype == torch.float32
        assert 0 < (own - right).norm() < 0.01 * right.norm()


def test_encoders_with_different_words_are_no_pair(encoder: ClipTextEncoderPair) -> None:
    embeddings = word()
    embeddings["clip_g"]["<new1>"] = torch.zeros(2, XL_POOLED_WIDTH)
    for wrong in (embeddings, {"clip_l": embeddings["clip_l"]}):
        with pytest.raises(TokenError) as caught:
            encoder.with_tokens(wrong)
        assert "new words of the text encoders clip_l and clip_g differ" in str(caught.value)
        assert "<new1> of 1" in str(caught.value)
        assert "train it again" in str(caught.value)


def test_fingerprints_tell_both_encoders_apart(xl_pipeline: StableDiffusionXLPipeline) -> None:
    first, second = (text_encoder(xl_pipeline) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    changed = copy.copy(xl_pipeline)
    changed.text_encoder = copy.deepcopy(xl_pipeline.text_encoder)
    with torch.no_grad():
        changed.text_encoder.get_input_embeddings().weight[5, 5] += 1
    assert text_encoder(changed).fingerprint() != first.fingerprint()
    assert first.with_tokens(word()).fingerprint() != first.fingerprint()


def test_whether_a_hidden_layer_is_normed_is_in_the_fingerprint(
    xl_pipeline: StableDiffusionXLPipeline,
) -> None:
    model, tokenizer = xl_pipeline.text_encoder, xl_pipeline.tokenizer
    prints = {
        ClipTextEncoder(
            "clip_l", model, tokenizer, pad_id=END, hidden_layer=-2, normed=normed
        ).fingerprint()
        for normed in (True, False)
    }
    assert len(prints) == 2


# The network


@torch.no_grad()
def test_the_prediction_is_that_of_the_unet_called_as_the_diffusers_pipeline_calls_it(
    xl_pipeline: StableDiffusionXLPipeline, models: DiffusersModels
) -> None:
    denoiser = models.denoiser
    assert denoiser.family is FAMILIES["sdxl"]
    assert len(denoiser.projections) == 24
    context, _, pooled, _ = xl_pipeline.encode_prompt(
        PROMPTS[1:3], device="cpu", do_classifier_free_guidance=False
    )
    given = [((80, 120), (3, 7), (64, 64)), ((64, 64), (0, 0), (64, 64))]
    time_ids = torch.cat(
        [xl_pipeline._get_add_time_ids(*sizes, torch.float32, XL_POOLED_WIDTH) for sizes in given]
    )
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([17, 801])
    wanted = xl_pipeline.unet(
        latents,
        timesteps,
        encoder_hidden_states=context,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
    ).sample
    sizes = torch.tensor([[80, 120, 3, 7, 64, 64], [64, 64, 0, 0, 64, 64]])
    assert torch.equal(denoiser.predict(latents, timesteps, context, pooled, sizes), wanted)
    for other in ((pooled.flip(0), sizes), (pooled, sizes.flip(0))):
        assert not torch.allclose(denoiser.predict(latents, timesteps, context, *other), wanted)


def test_models_are_given_back_as_they_were(xl_pipeline: StableDiffusionXLPipeline) -> None:
    modules = [
        xl_pipeline.unet, xl_pipeline.text_encoder, xl_pipeline.text_encoder_2, xl_pipeline.vae,
    ]  # fmt: skip
    flags = requires_grad_map(*modules)
    with borrowed_models(xl_pipeline):
        assert not any(p.requires_grad for module in modules for p in module.parameters())
    assert requires_grad_map(*modules) == flags


def test_unets_that_read_something_else_are_refused() -> None:
    def unet(width: int) -> UNet2DConditionModel:
        return UNet2DConditionModel(
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=width,
            attention_head_dim=4,
            norm_num_groups=4,
        )

    with pytest.raises(IncompatibleModelError, match="width 1280; known families are"):
        DiffusersDenoiser(unet(1280), sd_scheduler(), tiny_vae())  # the refiner's width
    with pytest.raises(IncompatibleModelError, match="beside them nothing"):
        DiffusersDenoiser(unet(2048), sd_scheduler(), tiny_vae())


# Training


def assert_nearly_equal(ours: Tensor, wanted: Tensor) -> None:
    """Adam's step is as long for a gradient of almost nothing, where rounding decides its sign."""
    assert (ours - wanted).norm() < 1e-3 * wanted.norm()
    assert (ours - wanted).abs().max() < 2e-4


def assert_equal_to_naive(
    pipeline: StableDiffusionXLPipeline, settings: TrainConfig, concept: TrainingConcept
) -> None:
    with borrowed_models(pipeline) as models:
        ours = trained(models, settings, concept)
        encoder = models.text_encoder
    losses, changes, rows = naive_training(pipeline, settings, [concept], [random_bank(concept)])
    np.testing.assert_allclose(ours.provenance["final_losses"], losses, atol=1e-5, rtol=0)
    assert len(changes) == len(ours.deltas) == 24
    for name, change in changes.items():
        assert change.any()
        assert_nearly_equal(ours.deltas[layer_of(name)].dense(), change)
    learnt = [row.split(list(WIDTHS.values()), 1) for row in (rows_of(ours), rows)]
    start = [encoder.vocabulary_row(42170)[name] for name in WIDTHS]
    for one, other, before in zip(*learnt, start, strict=True):
        assert_nearly_equal(one - before, other - before)


@pytest.mark.parametrize(
    ("cut", "at_once"),
    [("none", 0), ("start", 3), ("start and padding", 0), ("own words", 0), ("own words", 3)],
)
def test_three_steps_equal_those_of_a_naive_loop(
    xl_pipeline: StableDiffusionXLPipeline, cut: GradientCut, at_once: int
) -> None:
    """The views of the bank come from pictures of different sizes."""
    concept = cat_concept(2, regularization=2)
    assert_equal_to_naive(xl_pipeline, config(gradient_cut=cut, micro_batch_size=at_once), concept)


def test_training_leaves_the_models_as_they_were_and_repeats_itself(
    xl_pipeline: StableDiffusionXLPipeline, models: DiffusersModels
) -> None:
    modules = xl_pipeline.unet, xl_pipeline.text_encoder_2
    before, pictures = state(*modules), []
    concept = cat_concept()
    for _ in range(2):
        train(
            config(steps=1, preview_every_steps=1),
            [concept],
            [random_bank(concept)],
            models.denoiser,
            models.text_encoder,
            on_event=lambda e: pictures.append(e) if isinstance(e, PreviewDrawn) else None,
        )
    assert same_state(before, *modules)
    first, second = (event.image_hwc for event in pictures)
    assert first.shape == (RESOLUTION, RESOLUTION, 3) and first.isfinite().all()
    assert torch.equal(first, second)


# The whole way


@torch.no_grad()
def test_a_picture_is_drawn_as_by_hand(xl_pipeline: StableDiffusionXLPipeline) -> None:
    (picture,) = sample(
        xl_pipeline, ["a dog"], resolution=RESOLUTION, seeds=[3], steps=2, guidance=4.0
    )
    context, nothing, pooled, nothing_pooled = xl_pipeline.encode_prompt(
        "a dog", device="cpu", do_classifier_free_guidance=True, negative_prompt=""
    )
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    alphas = xl_pipeline.scheduler.alphas_cumprod
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    for now, then in ((999, 499), (499, 0)):
        towards, away = (
            xl_pipeline.unet(
                latents, now, text, added_cond_kwargs={"text_embeds": row, "time_ids": sizes}
            ).sample
            for text, row in ((context, pooled), (nothing, nothing_pooled))
        )
        noise = away + 4.0 * (towards - away)
        clean = (latents - (1 - alphas[now]) ** 0.5 * noise) / alphas[now] ** 0.5
        latents = alphas[then] ** 0.5 * clean + (1 - alphas[then]) ** 0.5 * noise
    decoded = xl_pipeline.vae.decode(latents / 0.13025).sample[0].permute(1, 2, 0)
    torch.testing.assert_close(picture, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)


def test_concepts_are_saved_read_merged_and_applied(
    xl_pipeline: StableDiffusionXLPipeline, models: DiffusersModels, tmp_path: Path
) -> None:
    read = []
    for concept in (cat_concept(), dog_concept()):
        learnt = trained(models, config(method="low-rank", rank=2), concept)
        file = write_concept(learnt, tmp_path / "concept.safetensors", torch.float32)
        read.append(read_concept(file))
        assert read[-1].family is FAMILIES["sdxl"]
        assert torch.equal(rows_of(read[-1]), rows_of(learnt))
        for layer, delta in learnt.deltas.items():
            assert torch.equal(read[-1].deltas[layer].dense(), delta.dense())

    captions = ["a cat on the beach", "two dogs", "a red house at night"]
    merged, report = merge_concepts(read, models.text_encoder, captions=captions)
    assert max(report.residuals) < 0.01 or report.damped
    assert [token.name for token in merged.tokens] == ["<new1>", "<new2>"]

    before = state(xl_pipeline.unet)
    pictures = [
        sample(xl_pipeline, ["a <new1> cat"], concept, resolution=RESOLUTION, steps=2)
        for concept in (merged, read[0], None)
    ]
    assert all(picture.isfinite().all() for picture in pictures)
    assert not torch.equal(pictures[0], pictures[2])
    assert same_state(before, xl_pipeline.unet)
    with applied_concept(xl_pipeline, merged) as knowing:
        assert len(knowing.tokenize("<new1> <new2>")) == 4


def test_a_folder_is_loaded_and_its_autoencoder_stays_exact(
    xl_pipeline: StableDiffusionXLPipeline, tmp_path: Path
) -> None:
    """SDXL's autoencoder overflows in half precision."""
    xl_pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path, dtype=torch.bfloat16)
    assert loaded.unet.conv_in.weight.dtype == torch.bfloat16
    assert loaded.vae.dtype == torch.float32
    assert loaded.text_encoder_2.dtype == torch.float32
    with borrowed_models(loaded) as models:
        mean, _ = models.latent_encoder.moments(torch.zeros(3, RESOLUTION, RESOLUTION))
        learnt = trained(models, config(steps=1, batch_size=2), cat_concept())
    assert mean.isfinite().all()
    assert np.isfinite(learnt.provenance["final_losses"]).all()
    assert sample(loaded, ["a <new1> cat"], learnt, resolution=RESOLUTION, steps=1).isfinite().all()


def test_a_refiner_is_refused(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionXLImg2ImgPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(IncompatibleModelError) as caught:
        load_pipeline(tmp_path)
    assert "it is a StableDiffusionXLImg2ImgPipeline" in str(caught.value)
    assert "needed is a StableDiffusionPipeline or a StableDiffusionXLPipeline" in str(caught.value)
    assert "give another one" in str(caught.value)


def test_a_concept_of_sdxl_does_not_go_on_another_model(
    pipeline: StableDiffusionPipeline, models: DiffusersModels
) -> None:
    learnt = trained(models, config(method="textual inversion", steps=1), cat_concept())
    with (
        pytest.raises(IncompatibleModelError, match="trained on Stable Diffusion XL"),
        applied_concept(pipeline, learnt),
    ):
        pass
