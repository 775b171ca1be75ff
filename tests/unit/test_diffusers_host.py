"""The pack on a diffusers pipeline: borrowing, applying, and the whole way through a file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from custom_diffusion.concept.concept import Concept, ModifierToken
from custom_diffusion.concept.delta import DenseDelta, LowRankDelta
from custom_diffusion.concept.errors import IncompatibleModelError
from custom_diffusion.concept.file import read_concept, write_concept
from custom_diffusion.concept.layers import FAMILIES, layer_to_diffusers
from custom_diffusion.host.diffusers.denoiser import DiffusersDenoiser, DiffusersLatentEncoder
from custom_diffusion.host.diffusers.lending import borrowed_models, text_encoder
from custom_diffusion.host.diffusers.loading import load_pipeline
from custom_diffusion.host.diffusers.sampling import applied_concept, sample, side_by_side
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.data.captioned import CaptionedImage
from custom_diffusion.trainer.data.latents import encode_views
from custom_diffusion.trainer.data.training_concept import TrainingConcept
from custom_diffusion.trainer.loop import train
from diffusers import StableDiffusionPipeline
from PIL import Image
from support.tiny_models import (
    CONTEXT_WIDTH,
    RESOLUTION,
    cat_concept,
    random_bank,
    requires_grad_map,
    same_state,
    sd_scheduler,
    state,
    tiny_pipeline,
    tiny_unet_without_cross_attention,
    training_map,
)
from torch import Tensor

PROMPT = "photo of a <new1> cat"


def modules_of(pipeline: StableDiffusionPipeline) -> tuple[Any, ...]:
    return pipeline.unet, pipeline.text_encoder, pipeline.vae


def prediction(pipeline: StableDiffusionPipeline, context: Tensor) -> Tensor:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipeline.unet(latents, torch.tensor([500]), encoder_hidden_states=context).sample


def features(encoder: Any, prompt: str = PROMPT) -> Tensor:
    with torch.no_grad():
        return encoder.encode(encoder.pad([encoder.tokenize(prompt)]))


@pytest.fixture
def concept(pipeline: StableDiffusionPipeline) -> Concept:
    """Random deltas, one of them of low rank, and a token."""
    generator = torch.Generator().manual_seed(0)
    layers = DiffusersDenoiser(pipeline.unet, pipeline.scheduler, pipeline.vae).projections
    deltas: dict[str, Any] = {
        layer: DenseDelta(
            0.05
            * torch.randn(pipeline.unet.get_parameter(f"{path}.weight").shape, generator=generator)
        )
        for layer, path in layers.items()
    }
    first, (width, _) = next((k, d.shape) for k, d in deltas.items())
    deltas[first] = LowRankDelta(
        torch.randn(width, 2, generator=generator), torch.randn(2, 768, generator=generator) / 10
    )
    row = torch.randn(1, CONTEXT_WIDTH, generator=generator) / 10
    token = ModifierToken("<new1>", "cat", {"clip_l": row})
    return Concept(FAMILIES["sd15"], deltas, (token,))


@pytest.fixture(scope="module")
def model_folder(
    pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The pipeline in diffusers' layout."""
    folder = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(folder)
    return folder


# Borrowing


def test_borrowed_models_are_frozen_and_given_back(pipeline: StableDiffusionPipeline) -> None:
    modules = modules_of(pipeline)
    pipeline.unet.train()
    pipeline.unet.conv_in.requires_grad_(False)
    flags, modes, weights = requires_grad_map(*modules), training_map(*modules), state(*modules)
    try:
        with borrowed_models(pipeline):
            assert not any(p.requires_grad for module in modules for p in module.parameters())
            assert not any(module.training for module in modules)
        assert requires_grad_map(*modules) == flags
        assert training_map(*modules) == modes
        assert same_state(weights, *modules)
    finally:
        pipeline.unet.eval().requires_grad_(True)


def test_borrowed_models_are_given_back_after_an_exception(
    pipeline: StableDiffusionPipeline,
) -> None:
    modules = modules_of(pipeline)
    flags, modes = requires_grad_map(*modules), training_map(*modules)
    with pytest.raises(RuntimeError, match="in the middle"), borrowed_models(pipeline):
        raise RuntimeError("in the middle")
    assert requires_grad_map(*modules) == flags
    assert training_map(*modules) == modes


def test_parts_that_were_in_another_mode_come_back_in_it(
    pipeline: StableDiffusionPipeline,
) -> None:
    modules = modules_of(pipeline)
    pipeline.unet.train()
    pipeline.unet.mid_block.eval()
    modes = training_map(*modules)
    try:
        with borrowed_models(pipeline):
            pass
        assert training_map(*modules) == modes
    finally:
        pipeline.unet.eval()


def test_a_unet_without_cross_attention_is_refused_and_given_back(
    pipeline: StableDiffusionPipeline,
) -> None:
    unet = tiny_unet_without_cross_attention().train()
    other = SimpleNamespace(
        unet=unet,
        text_encoder=pipeline.text_encoder,
        vae=pipeline.vae,
        scheduler=pipeline.scheduler,
        tokenizer=pipeline.tokenizer,
    )
    with (
        pytest.raises(IncompatibleModelError) as caught,
        borrowed_models(other),
    ):
        pass
    assert "UNet2DModel has no cross-attention" in str(caught.value)
    assert "Custom Diffusion needs the UNet of Stable Diffusion 1.x, 2.x or XL" in str(caught.value)
    assert unet.training
    assert all(parameter.requires_grad for parameter in unet.parameters())


def test_a_schedule_that_predicts_something_else_is_refused(
    pipeline: StableDiffusionPipeline,
) -> None:
    with pytest.raises(IncompatibleModelError, match="predicts 'sample'; epsilon or v_prediction"):
        DiffusersDenoiser(pipeline.unet, sd_scheduler("sample"), pipeline.vae)


def test_the_denoiser_is_the_pipeline_seen_through_the_protocol(
    pipeline: StableDiffusionPipeline, v_pipeline: StableDiffusionPipeline
) -> None:
    with borrowed_models(pipeline) as models, borrowed_models(v_pipeline) as v_models:
        denoiser = models.denoiser
        assert (denoiser.prediction_type, v_models.denoiser.prediction_type) == ("epsilon", "v")
        assert denoiser.family is FAMILIES["sd15"]
        assert torch.equal(denoiser.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
        assert (denoiser.dtype, denoiser.device) == (torch.float32, torch.device("cpu"))
        attention = [n for n, _ in pipeline.unet.named_modules() if n.endswith("attn2")]
        assert len(attention) == 6
        wanted = {f"{path}.{name}" for path in attention for name in ("to_k", "to_v")}
        assert set(denoiser.projections.values()) == wanted
        assert all(layer_to_diffusers(k) == path for k, path in denoiser.projections.items())
        context = torch.randn(1, 77, CONTEXT_WIDTH)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours = denoiser.predict(latents, torch.tensor([500]), context)
        assert torch.equal(ours, prediction(pipeline, context))


def test_moments_are_those_of_the_autoencoder_times_its_scale(
    pipeline: StableDiffusionPipeline,
) -> None:
    image = torch.rand(3, 64, 64) * 2 - 1
    mean, deviation = DiffusersLatentEncoder(pipeline.vae).moments(image)
    with torch.no_grad():
        posterior = pipeline.vae.encode(image[None]).latent_dist
    assert mean.shape == deviation.shape == (4, 8, 8)
    torch.testing.assert_close(mean, posterior.mean[0] * 0.18215)
    torch.testing.assert_close(deviation, posterior.var[0].sqrt() * 0.18215)


def test_previews_are_decoded_pictures(pipeline: StableDiffusionPipeline) -> None:
    latents = torch.randn(2, 4, 8, 8)
    denoiser = DiffusersDenoiser(pipeline.unet, pipeline.scheduler, pipeline.vae)
    pictures = denoiser.preview(latents)
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / 0.18215).sample
    wanted = pipeline.image_processor.postprocess(decoded, output_type="np")
    np.testing.assert_allclose(pictures.numpy(), wanted, atol=1e-6)


def test_the_text_encoder_pads_as_the_tokenizer_does(pipeline: StableDiffusionPipeline) -> None:
    ours = features(text_encoder(pipeline), "photo of a cat")
    wanted, _ = pipeline.encode_prompt("photo of a cat", "cpu", 1, False)
    torch.testing.assert_close(ours, wanted.detach(), atol=1e-6, rtol=1e-6)


# Applying


@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0])
def test_an_applied_concept_adds_its_deltas_and_takes_them_away_again(
    pipeline: StableDiffusionPipeline, concept: Concept, strength: float
) -> None:
    weights, flags = state(*modules_of(pipeline)), requires_grad_map(*modules_of(pipeline))
    by_hand = copy.deepcopy(pipeline.unet)
    with torch.no_grad():
        for layer, delta in concept.deltas.items():
            path = layer_to_diffusers(layer)
            by_hand.get_parameter(f"{path}.weight").add_(strength * delta.dense())
    with applied_concept(pipeline, concept, strength) as encoder:
        for name, wanted in by_hand.named_parameters():
            found = pipeline.unet.get_parameter(name)
            torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-6)
        assert len(encoder.tokenize("<new1>")) == 3
        assert not same_state(weights[:1], pipeline.unet)
    assert same_state(weights, *modules_of(pipeline))
    assert requires_grad_map(*modules_of(pipeline)) == flags


def test_weights_come_back_after_an_exception(
    pipeline: StableDiffusionPipeline, concept: Concept
) -> None:
    weights = state(*modules_of(pipeline))
    with pytest.raises(RuntimeError, match="in the middle"), applied_concept(pipeline, concept):
        raise RuntimeError("in the middle")
    assert same_state(weights, *modules_of(pipeline))


def test_strength_zero_is_the_base_model(
    pipeline: StableDiffusionPipeline, concept: Concept
) -> None:
    context = features(text_encoder(pipeline), "photo of a cat")
    base = prediction(pipeline, context)
    with applied_concept(pipeline, concept, 0.0) as encoder:
        assert torch.equal(prediction(pipeline, context), base)
        assert torch.equal(features(encoder, "photo of a cat"), context)
    with applied_concept(pipeline, concept, 1.0):
        assert (prediction(pipeline, context) - base).abs().max() > 1e-3


def test_the_token_means_its_row_while_the_concept_is_applied(
    pipeline: StableDiffusionPipeline, concept: Concept
) -> None:
    cat_row = text_encoder(pipeline).vocabulary_row(2368)
    twin = Concept(concept.family, {}, (ModifierToken("<new1>", "cat", cat_row),))
    with applied_concept(pipeline, twin) as encoder:
        assert torch.equal(
            features(encoder, "photo of a <new1>"), features(encoder, "photo of a cat")
        )
    with applied_concept(pipeline, concept) as encoder:
        assert not torch.equal(
            features(encoder, "photo of a <new1>"), features(encoder, "photo of a cat")
        )


def test_a_half_precision_unet_gets_its_weights_back_to_the_bit(
    pipeline: StableDiffusionPipeline, concept: Concept
) -> None:
    half = copy.copy(pipeline)
    half.unet = copy.deepcopy(pipeline.unet).to(torch.float16)
    weights = state(half.unet)
    path = f"{layer_to_diffusers(concept.layers[0])}.weight"
    with applied_concept(half, concept):
        found = half.unet.get_parameter(path)
        assert found.dtype == torch.float16
        base = pipeline.unet.get_parameter(path).half().float()
        wanted = (base + concept.deltas[concept.layers[0]].dense()).half()
        assert torch.equal(found, wanted)
    assert same_state(weights, half.unet)


def test_a_concept_of_a_larger_model_is_refused(
    pipeline: StableDiffusionPipeline, concept: Concept
) -> None:
    layer = "input_blocks.8.1.transformer_blocks.0.attn2.to_k"
    larger = Concept(concept.family, {**concept.deltas, layer: DenseDelta(torch.zeros(64, 768))})
    weights = state(pipeline.unet)
    with pytest.raises(IncompatibleModelError) as caught, applied_concept(pipeline, larger):
        pass
    assert "does not fit this model in 1 of 13 projections" in str(caught.value)
    assert f"{layer} is (64, 768) in the concept and absent in the model" in str(caught.value)
    assert "Load the base model it was trained on" in str(caught.value)
    assert same_state(weights, pipeline.unet)


def test_a_concept_of_other_widths_is_refused(
    pipeline: StableDiffusionPipeline, concept: Concept
) -> None:
    layer, delta = next(iter(concept.deltas.items()))
    wide = {**concept.deltas, layer: DenseDelta(torch.zeros(delta.shape[0] * 2, 768))}
    weights = state(pipeline.unet)
    with (
        pytest.raises(
            IncompatibleModelError, match=r"is \(64, 768\) in the concept and \(32, 768\)"
        ),
        applied_concept(pipeline, Concept(concept.family, wide)),
    ):
        pass
    assert same_state(weights, pipeline.unet)


def test_without_a_concept_the_pipeline_is_the_base_model(
    pipeline: StableDiffusionPipeline,
) -> None:
    context = features(text_encoder(pipeline))
    with applied_concept(pipeline, None) as encoder:
        assert torch.equal(features(encoder), context)
        applied = prediction(pipeline, context)
    assert torch.equal(applied, prediction(pipeline, context))


def test_a_concept_of_another_family_is_refused_with_both_names(
    pipeline: StableDiffusionPipeline, concept: Concept
) -> None:
    deltas = {k: DenseDelta(torch.zeros(d.shape[0], 1024)) for k, d in concept.deltas.items()}
    token = ModifierToken("<new1>", "cat", {"clip_h": torch.zeros(1, 1024)})
    weights = state(pipeline.unet)
    for other in (
        Concept(FAMILIES["sd2"], deltas, (token,)),
        Concept(FAMILIES["sd2"], {}, (token,)),
    ):
        with pytest.raises(IncompatibleModelError) as caught, applied_concept(pipeline, other):
            pass
        assert "Stable Diffusion 2.x" in str(caught.value)
        assert "Stable Diffusion 1.x" in str(caught.value)
    assert same_state(weights, pipeline.unet)


# Sampling


def drawn(
    pipeline: StableDiffusionPipeline,
    *prompts: str,
    concept: Concept | None = None,
    seeds: Sequence[int] = (),
) -> Tensor:
    return sample(pipeline, prompts, concept, resolution=RESOLUTION, seeds=seeds, steps=2)


def test_samples_depend_on_seeds_and_concept_alone(
    pipeline: StableDiffusionPipeline, concept: Concept
) -> None:
    weights, flags = state(*modules_of(pipeline)), requires_grad_map(*modules_of(pipeline))
    generator_state = torch.get_rng_state()
    first = drawn(pipeline, PROMPT, PROMPT)
    assert first.shape == (2, RESOLUTION, RESOLUTION, 3)
    assert first.dtype == torch.float32
    assert 0 <= first.min() < first.max() <= 1
    assert torch.equal(first, drawn(pipeline, PROMPT, PROMPT))
    assert not torch.equal(first, drawn(pipeline, PROMPT, PROMPT, seeds=[1, 2]))
    assert not torch.equal(first, drawn(pipeline, PROMPT, PROMPT, concept=concept))
    assert same_state(weights, *modules_of(pipeline))
    assert requires_grad_map(*modules_of(pipeline)) == flags
    assert torch.equal(torch.get_rng_state(), generator_state)


def test_one_prompt_twice_gives_two_pictures_each_of_its_own_seed(
    pipeline: StableDiffusionPipeline,
) -> None:
    one, other = drawn(pipeline, PROMPT, PROMPT, seeds=[5, 7])
    assert (one - other).abs().max() > 1e-2
    torch.testing.assert_close(drawn(pipeline, PROMPT, seeds=[7])[0], other, atol=1e-5, rtol=0)


def test_a_picture_depends_on_its_own_prompt_and_not_on_the_others(
    pipeline: StableDiffusionPipeline, concept: Concept
) -> None:
    alone = drawn(pipeline, PROMPT, concept=concept)
    pair = drawn(pipeline, PROMPT, "a dog", concept=concept)
    other_pair = drawn(pipeline, PROMPT, "photo of a house", concept=concept)
    torch.testing.assert_close(pair[:1], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(other_pair[:1], alone, atol=1e-5, rtol=0)
    assert (pair[1] - other_pair[1]).abs().max() > 1e-3


def test_pictures_lie_side_by_side_in_order() -> None:
    shades = torch.tensor([0.0, 0.5, 1.0])
    image = side_by_side(shades[:, None, None, None].expand(3, 4, 5, 3))
    assert (image.size, image.mode) == ((15, 4), "RGB")
    assert [image.getpixel((x, 3)) for x in (0, 4, 5, 9, 10, 14)] == [
        (shade,) * 3 for shade in (0, 0, 128, 128, 255, 255)
    ]


# The whole way


def test_a_concept_is_trained_written_read_and_applied(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    training_concept = TrainingConcept(
        images=(CaptionedImage(image, PROMPT),),
        class_noun="cat",
        token="<new1>",
        regularization=(CaptionedImage(image, "photo of a cat"),),
    )
    settings = TrainConfig(
        steps=3, batch_size=2, learning_rate=1e-2, resolution=RESOLUTION, views_per_image=4
    )
    weights = state(*modules_of(pipeline))
    with borrowed_models(pipeline) as models:
        bank = encode_views(training_concept, models.latent_encoder, settings)
        learnt = train(settings, [training_concept], [bank], models.denoiser, models.text_encoder)
    assert same_state(weights, *modules_of(pipeline))
    with applied_concept(pipeline, learnt) as encoder:
        wanted_features = features(encoder)
        wanted = prediction(pipeline, wanted_features)
    base = prediction(pipeline, wanted_features)

    again = read_concept(write_concept(learnt, tmp_path / "cat.safetensors"))
    with applied_concept(pipeline, again) as encoder:
        torch.testing.assert_close(features(encoder), wanted_features, atol=1e-2, rtol=1e-2)
        found = prediction(pipeline, features(encoder))
        pictures = pipeline(
            prompt_embeds=features(encoder),
            negative_prompt_embeds=features(encoder, ""),
            num_inference_steps=2,
            height=RESOLUTION,
            width=RESOLUTION,
            output_type="np",
        ).images
    assert (found - wanted).abs().max() < 0.05 * (base - wanted).abs().max()
    assert pictures.shape == (1, RESOLUTION, RESOLUTION, 3)
    assert np.isfinite(pictures).all()
    assert same_state(weights, *modules_of(pipeline))
    assert again.provenance["final_losses"] == learnt.provenance["final_losses"]


def test_a_pipeline_folder_is_loaded_and_trains_in_half_precision(
    pipeline: StableDiffusionPipeline, model_folder: Path
) -> None:
    loaded = load_pipeline(model_folder, dtype=torch.bfloat16)
    assert loaded.unet.conv_in.weight.dtype == loaded.vae.dtype == torch.bfloat16
    for name, weight in pipeline.unet.named_parameters():
        if "attn2.to_k" in name or "attn2.to_v" in name:
            assert torch.equal(loaded.unet.get_parameter(name), weight)
    training_concept = cat_concept()
    settings = TrainConfig(steps=2, batch_size=2, resolution=RESOLUTION, preview_every_steps=2)
    weights = state(loaded.unet)
    with borrowed_models(loaded) as models:
        moments = models.latent_encoder.moments(torch.zeros(3, RESOLUTION, RESOLUTION))
        bank = random_bank(training_concept)
        learnt = train(settings, [training_concept], [bank], models.denoiser, models.text_encoder)
    assert all(moment.dtype == torch.float32 for moment in moments)
    assert same_state(weights, loaded.unet)
    assert np.isfinite(learnt.provenance["final_losses"]).all()
    assert all(d.dense().dtype == torch.float32 and d.dense().any() for d in learnt.deltas.values())


def test_text_encoders_are_float32_whatever_the_type_of_their_files(tmp_path: Path) -> None:
    """Most downloaded folders are in half precision."""
    tiny_pipeline().to(torch.float16).save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.text_encoder.parameters()} == {torch.float32}
    assert loaded.unet.conv_in.weight.dtype == torch.bfloat16


def test_a_pipeline_in_half_precision_can_draw(concept: Concept, model_folder: Path) -> None:
    loaded = load_pipeline(model_folder, dtype=torch.bfloat16)
    pictures = drawn(loaded, PROMPT, concept=concept)
    assert pictures.isfinite().all()
    assert side_by_side(pictures).size == (RESOLUTION, RESOLUTION)


def test_a_folder_without_a_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleModelError) as caught:
        load_pipeline(tmp_path / "nothing here")
    message = str(caught.value)
    assert f"There is no model {tmp_path / 'nothing here'}. Give a checkpoint" in message


def test_a_damaged_pipeline_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"')
    with pytest.raises(IncompatibleModelError) as caught:
        load_pipeline(tmp_path)
    assert f"{tmp_path} could not be loaded" in str(caught.value)
