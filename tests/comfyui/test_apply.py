"""A concept on ComfyUI's own MODEL and CLIP, judged by ComfyUI's stock loaders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.composition.routing import Route
from custom_diffusion.composition.timing import Span, SpanError
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import IncompatibleModelError, TokenError
from custom_diffusion.concept.file import concept_tensors, read_concept, write_concept
from safetensors.torch import save_file
from support.made_concepts import made_concept
from support.routed_samples import close, sample
from support.routed_samples import encode as prompt

PREFIX = "diffusion_model."


def apply(model: Any, clip: Any, concept: Concept, strength: float) -> tuple[Any, Any]:
    from custom_diffusion.host.comfyui.apply import apply_concept

    with torch.inference_mode():
        return apply_concept(model, clip, concept, strength)


def patched(model: Any) -> dict[str, torch.Tensor]:
    from custom_diffusion.host.comfyui.models.weights import patched_weights

    return patched_weights(model, PREFIX)


def encode(clip: Any, text: str) -> torch.Tensor:
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(text)).clone()


def snapshot(loaded: Any) -> list[torch.Tensor]:
    modules = (loaded.model.model, loaded.clip.cond_stage_model)
    return [t.detach().clone() for module in modules for t in module.state_dict().values()]


@pytest.mark.parametrize("rank", [None, 6], ids=["dense", "low rank"])
def test_stock_lora_loader_changes_the_same_weights_by_the_same_amount(
    comfy: Any, sd15: Any, shapes: Any, rank: int | None, tmp_path: Path
) -> None:
    concept = made_concept(shapes, rank=rank)
    path = write_concept(concept, tmp_path / "cat.safetensors")
    lora = comfy.utils.load_torch_file(str(path), safe_load=True)
    stock, _ = comfy.sd.load_lora_for_models(sd15.model, sd15.clip, lora, 0.7, 0.7)
    ours, _ = apply(sd15.model, sd15.clip, concept, 0.7)

    assert ours.patches.keys() == stock.patches.keys()
    base, by_us, by_stock = patched(sd15.model), patched(ours), patched(stock)
    changed = {name for name in base if not torch.equal(base[name], by_us[name])}
    assert changed == {f"{layer}.weight" for layer in shapes}
    largest = max(float((by_us[n] - by_stock[n]).abs().max()) for n in base)
    change = max(float((by_us[n] - base[n]).abs().max()) for n in base)
    print(f"ApplyKVDelta and LoraLoader differ by at most {largest:.1e} of {change:.1e}")
    assert largest < 2**-10 * change  # half precision of the file

    from_file, _ = apply(sd15.model, sd15.clip, read_concept(path), 0.7)
    for name, weight in patched(from_file).items():
        assert torch.equal(weight, by_stock[name])


def test_inputs_are_bit_identical_afterwards(sd15: Any, shapes: Any) -> None:
    before = snapshot(sd15)
    model, clip = apply(sd15.model, sd15.clip, made_concept(shapes), 1.0)
    encode(clip, "photo of a <new1> cat")
    assert not sd15.model.patches
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(sd15), strict=True))
    assert model is not sd15.model and clip is not sd15.clip


def test_strength_zero_is_the_base_model(sd15: Any, shapes: Any) -> None:
    model, clip = apply(sd15.model, sd15.clip, made_concept(shapes), 0.0)
    assert not model.patches
    text = "photo of a <new1> cat"
    assert torch.equal(encode(clip, text), encode(sd15.clip, text))


@pytest.mark.parametrize(
    "text",
    [
        "{new1}",
        "photo of a {new1} cat",
        "a ({new1} cat:1.2), on a table",
        "((a {new1} cat)) and [{new1}]",
        "a {new1} cat embedding:other on a chair",
        "embedding:other {new1} cat",
        "a {new1} cat and a {new2} dog, ({new2} dog:0.8)",
        "word " * 80 + "{new1} cat",
    ],
)
def test_token_in_a_prompt_means_what_a_stock_embedding_file_means(
    sd15: Any, shapes: Any, embeddings_folder: Path, text: str
) -> None:
    concepts = [
        made_concept(shapes, "<new1>", "cat", seed=1),
        made_concept(shapes, "<new2>", "dog", seed=2),
    ]
    save_file({"clip_l": torch.randn(2, 768) * 0.02}, embeddings_folder / "other.safetensors")
    clip = sd15.clip
    for concept in concepts:
        row = concept.tokens[0].embeddings["clip_l"]
        name = concept.tokens[0].name.strip("<>")
        save_file({"clip_l": row}, embeddings_folder / f"{name}.safetensors")
        _, clip = apply(sd15.model, clip, concept, 1.0)
    ours = encode(clip, text.format(new1="<new1>", new2="<new2>"))
    stock_text = text.format(new1=" embedding:new1 ", new2=" embedding:new2 ")
    assert torch.equal(ours, encode(sd15.clip, stock_text))


def test_bundled_embedding_is_read_by_the_stock_loader(
    sd15: Any, shapes: Any, embeddings_folder: Path
) -> None:
    concept = made_concept(shapes, seed=3)
    write_concept(concept, embeddings_folder / "whole.safetensors", torch.float32)
    _, clip = apply(sd15.model, sd15.clip, concept, 1.0)
    stock = encode(sd15.clip, "photo of a embedding:whole cat")
    assert torch.equal(encode(clip, "photo of a <new1> cat"), stock)


def test_same_token_twice_is_refused(sd15: Any, shapes: Any) -> None:
    _, clip = apply(sd15.model, sd15.clip, made_concept(shapes), 1.0)
    with pytest.raises(TokenError, match=r"<new1> is already taken.*Rename"):
        apply(sd15.model, clip, made_concept(shapes, seed=5), 1.0)


def test_concept_of_another_family_is_refused(sd15: Any) -> None:
    layer = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"
    concept = made_concept({layer: (640, 2048)}, family="sdxl")
    with pytest.raises(IncompatibleModelError, match=r"XL.*2048.*1\.x \(768\)\. Load"):
        apply(sd15.model, sd15.clip, concept, 1.0)


def test_concept_with_layers_that_the_model_lacks_is_refused(sd15: Any) -> None:
    layer = "input_blocks.8.1.transformer_blocks.0.attn2.to_k"
    with pytest.raises(IncompatibleModelError, match=r"absent in the model"):
        apply(sd15.model, sd15.clip, made_concept({layer: (1280, 768)}), 1.0)


def test_missing_clip_is_explained(sd15: Any, shapes: Any) -> None:
    with pytest.raises(IncompatibleModelError, match=r"No CLIP was given.*Connect"):
        apply(sd15.model, None, made_concept(shapes), 1.0)


def test_clip_of_another_family_is_refused(sd15: Any, load: Any, shapes: Any) -> None:
    with pytest.raises(IncompatibleModelError, match=r"clip_l.*Connect"):
        apply(sd15.model, load("sd2_v").clip, made_concept(shapes), 1.0)


def test_a_diffusion_transformer_is_refused(load: Any, sd15: Any, shapes: Any) -> None:
    with pytest.raises(IncompatibleModelError, match=r"no cross-attention.*load a checkpoint of"):
        apply(load("dit").model, sd15.clip, made_concept(shapes), 1.0)


def test_a_loras_patches_are_part_of_the_model_that_is_trained(sd15: Any, shapes: Any) -> None:
    from custom_diffusion.host.comfyui.models.unet import ComfyDenoiser

    concept = made_concept(shapes)
    model, _ = apply(sd15.model, sd15.clip, concept, 1.0)
    layer = next(iter(shapes))
    copy = ComfyDenoiser(model, torch.float32).network.get_parameter(f"{layer}.weight")
    base = sd15.model.model.diffusion_model.get_parameter(f"{layer}.weight")
    assert torch.allclose(copy, base.clone() + concept.deltas[layer].dense(), atol=1e-6)
    assert not copy.is_inference()


def test_every_tensor_of_the_file_is_known_to_the_stock_loader(
    comfy: Any, sd15: Any, shapes: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {k: t for k, t in concept_tensors(made_concept(shapes)).items() if PREFIX in k}
    comfy.sd.load_lora_for_models(sd15.model, sd15.clip, tensors, 1.0, 1.0)
    assert "not loaded" not in caplog.text


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_hooks_on_both_prompts_draw_what_the_applied_concept_draws(
    sd15: Any, shapes: Any, strength: float
) -> None:
    """At all times and without a mask."""
    import comfy.hooks
    from custom_diffusion.host.comfyui.apply import apply_concept, hook_concept

    concept = made_concept(shapes)
    texts = "a <new1> cat", "<new1>"
    with torch.inference_mode():
        model, knowing = apply_concept(sd15.model, sd15.clip, concept, strength)
        wanted = sample(model, *(prompt(knowing, text) for text in texts))
        knowing, hooks = hook_concept(sd15.model, sd15.clip, concept, strength)
        hooked = [
            comfy.hooks.set_hooks_for_conditioning(prompt(knowing, text), hooks) for text in texts
        ]
        ours = sample(sd15.model, *hooked)
        base = sample(sd15.model, *(prompt(knowing, text) for text in texts))
    close(ours, wanted, base)
    one = [hooked[0], prompt(knowing, texts[1])]
    assert not torch.allclose(sample(sd15.model, *one), wanted, atol=1e-3)  # they are where set


@pytest.mark.parametrize("kind", ["applied", "routed"])
def test_a_part_of_the_sampling(sd15: Any, shapes: Any, kind: str) -> None:
    """Before its start and after its end the sampler has the base model and the class word; between
    them the concept, in both halves of guidance.
    """
    from custom_diffusion.host.comfyui.apply import apply_concept
    from custom_diffusion.host.comfyui.routing import route_concepts

    concept = made_concept(shapes)
    texts, plain = ("a (<new1>:0.8) and <new1> cat", "<new1>"), ("a (cat:0.8) and cat", "cat")
    with torch.inference_mode():
        if kind == "applied":
            ours = apply_concept(sd15.model, sd15.clip, concept, 0.5, Span(0.3, 0.7))
            always = apply_concept(sd15.model, sd15.clip, concept, 0.5)
        else:
            routes = [Route(concept, 0.5)]
            ours = route_concepts(sd15.model, sd15.clip, routes, Span(0.3, 0.7))[:2]
            always = route_concepts(sd15.model, sd15.clip, routes)[:2]
        timed = step_by_step([(*ours, texts)] * 3)
        base = sd15.model, sd15.clip, plain
        wanted = step_by_step([base, (*always, texts), base])
        close(timed, wanted, step_by_step([(*always, texts)] * 3))
        skipped = ours[1].clone()
        skipped.clip_layer(-2)  # what other nodes do with a CLIP
        assert len(prompt(skipped, texts[0])) == 3


def step_by_step(each: Sequence[tuple[Any, Any, tuple[str, str]]]) -> torch.Tensor:
    """One of Euler's steps with each MODEL, CLIP and prompts, from where the last one ended."""
    import comfy.samplers

    sampling = each[0][0].get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", len(each))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * sigmas[0]
    for number, (model, clip, texts) in enumerate(each):
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(*(prompt(clip, text) for text in texts))
        guider.set_cfg(3.0)
        sampler = comfy.samplers.sampler_object("euler")
        zero, part = torch.zeros_like(latents), sigmas[number : number + 2]
        latents = guider.sample(zero, latents, sampler, part, disable_pbar=True, seed=0).clone()
    return latents


def test_a_part_that_is_none_is_refused() -> None:
    with pytest.raises(SpanError, match="from 0.5 to 0.5 .* would never act"):
        Span(0.5, 0.5)
