"""Routed concepts in ComfyUI's own samplers, judged by networks whose projections are computed by
hand: W₀ c + m ⊙ (D c), with m written down in each test.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.composition.features import MarkedFeatures
from custom_diffusion.composition.routing import Route
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.delta import DenseDelta
from custom_diffusion.concept.errors import IncompatibleModelError, TokenError
from custom_diffusion.concept.file import write_concept
from safetensors.torch import save_file
from support.comfy_server import ComfyServer
from support.comfy_xl import comfy_refiner_clip, comfy_xl_clip, comfy_xl_model
from support.graphs import Graph, draw, node
from support.made_concepts import made_concept
from support.routed_samples import (
    Conditioning,
    Hand,
    base_clip,
    by_hand,
    close,
    encode,
    noted,
    route,
    sample,
)
from torch import Tensor


@pytest.fixture
def cat(shapes: Any) -> Concept:
    return made_concept(shapes, "<new1>", "cat", seed=1)


@pytest.fixture
def dog(shapes: Any) -> Concept:
    return made_concept(shapes, "<new2>", "dog", seed=2)


def judge(
    loaded: Any,
    concepts: Sequence[Concept],
    make: Callable[[Any], tuple[Conditioning, Conditioning]],
    hands: Callable[[Conditioning, Conditioning], list[tuple[Tensor, Sequence[Hand]]]],
    batch: int = 1,
    steps: int = 1,
) -> None:
    """Samples with the node, by hand, and with neither, from the same prompts."""
    model, clip = route(loaded.model, loaded.clip, *concepts)
    ours = sample(model, *make(clip), batch, steps)
    positive, negative = make(base_clip(loaded.clip, *concepts))
    with by_hand(loaded.model, *hands(positive, negative)):
        wanted = sample(loaded.model, positive, negative, batch, steps)
    close(ours, wanted, sample(loaded.model, positive, negative, batch, steps))


def rows(start: int, end: int, share: float = 1.0) -> dict[int, float]:
    return dict.fromkeys(range(start, end), share)


def test_each_concept_acts_at_its_own_words_in_both_halves_of_guidance(
    sd15: Any, cat: Concept, dog: Concept
) -> None:
    # start a <new1> cat and a <new2> dog | start <new2> dog, and a cat
    judge(
        sd15,
        [cat, dog],
        lambda clip: (
            encode(clip, "a <new1> cat and a <new2> dog"),
            encode(clip, "<new2> dog cat"),
        ),
        lambda p, n: [
            (p[0][0], [(cat, 1, rows(2, 4)), (dog, 1, rows(6, 8))]),
            (n[0][0], [(dog, 1, rows(1, 3))]),
        ],
        steps=2,
    )


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("a (<new1> cat:1.2), on a table", rows(2, 4)),
        ("(<new1>:0.7) cat, <new1> again and a cat", {**rows(1, 3), 4: 1.0}),
        ("embedding:other <new1> cat", rows(3, 5)),
        ("embedding:wide <new1> cat", rows(1, 3)),
        ("word " * 80 + "<new1> cat", rows(83, 85)),
        ("word " * 74 + "<new1> cat", {75: 1.0, 78: 1.0}),
    ],
    ids=["weight", "alone and twice", "embedding", "ignored embedding", "long", "cut in two"],
)
def test_rows_are_known(
    sd15: Any, cat: Concept, text: str, mask: dict[int, float], embeddings_folder: Path
) -> None:
    save_file({"clip_l": torch.randn(2, 768) * 0.02}, embeddings_folder / "other.safetensors")
    save_file({"other": torch.randn(1, 640) * 0.02}, embeddings_folder / "wide.safetensors")
    judge(
        sd15,
        [cat],
        lambda clip: (encode(clip, text), encode(clip, "")),
        lambda p, n: [(p[0][0], [(cat, 1, mask)])],
    )


def combined(how: str, clip: Any) -> Conditioning:
    """Two prompts put together by ComfyUI's own nodes."""
    import nodes as comfy_nodes

    first, second = encode(clip, "a <new1> cat"), encode(clip, "the big <new1> cat <new2> dog")
    with torch.inference_mode():
        if how == "concat":
            return comfy_nodes.ConditioningConcat().concat(first, second)[0]
        if how == "average":
            return comfy_nodes.ConditioningAverage().addWeighted(first, second, 0.3)[0]
        if how == "zero out":
            zero = comfy_nodes.ConditioningZeroOut().zero_out(second)[0]
            return comfy_nodes.ConditioningAverage().addWeighted(first, zero, 0.5)[0]
        if how == "multiply":
            return [[first[0][0] * 1.5, first[0][1]]]
        if how == "area":
            left = comfy_nodes.ConditioningSetArea().append(first, 32, 64, 0, 0, 1.0)[0]
            return comfy_nodes.ConditioningCombine().combine(left, second)[0]
        if how == "mask":
            half = torch.zeros(1, 8, 8)
            half[..., :4] = 1
            left = comfy_nodes.ConditioningSetMask().append(first, half, "default", 1.0)[0]
            return comfy_nodes.ConditioningCombine().combine(left, second)[0]
        early = comfy_nodes.ConditioningSetTimestepRange().set_range(first, 0.0, 0.5)[0]
        late = comfy_nodes.ConditioningSetTimestepRange().set_range(second, 0.5, 1.0)[0]
        return comfy_nodes.ConditioningCombine().combine(early, late)[0]


@pytest.fixture(scope="module")
def comfy_nodes(comfy: Any) -> Any:
    return pytest.importorskip("nodes")


@pytest.mark.parametrize("how", ["concat", "area", "mask", "timesteps", "multiply"])
def test_prompts_put_together(
    sd15: Any, cat: Concept, dog: Concept, how: str, comfy_nodes: Any
) -> None:
    first, second = rows(2, 4), [(cat, 1.0, rows(3, 5)), (dog, 1.0, rows(5, 7))]

    def hands(p: Conditioning, n: Conditioning) -> list[tuple[Tensor, Sequence[Hand]]]:
        if how == "concat":
            after = [(c, a, {77 + row: 1.0 for row in mask}) for c, a, mask in second]
            return [(p[0][0], [(cat, 1.0, first), *after])]
        if how == "multiply":
            return [(p[0][0], [(cat, 1.0, first)])]
        return [(p[0][0], [(cat, 1.0, first)]), (p[1][0], second)]

    steps = 2 if how == "timesteps" else 1
    judge(sd15, [cat, dog], lambda c: (combined(how, c), encode(c, "")), hands, steps=steps)


@pytest.mark.parametrize("how", ["average", "zero out"])
def test_a_weighted_mean_of_prompts_has_the_mean_of_what_each_adds(
    sd15: Any, cat: Concept, dog: Concept, how: str, comfy_nodes: Any
) -> None:
    """Judged at the features: what a concept adds to a mean is not D times the mean's rows."""
    _, clip = route(sd15.model, sd15.clip, cat, dog)
    knowing = base_clip(sd15.clip, cat, dog)
    mean = combined(how, clip)[0][0]
    assert isinstance(mean, MarkedFeatures)
    one, two = (encode(knowing, t)[0][0] for t in ("a <new1> cat", "the big <new1> cat <new2> dog"))
    share = {"average": (0.3, 0.7), "zero out": (0.5, 0.0)}[how]
    wanted = torch.zeros(2, 1, 77, 768)
    wanted[0, :, 2:4] += share[0] * one[:, 2:4]
    wanted[0, :, 3:5] += share[1] * two[:, 3:5]
    wanted[1, :, 5:7] += share[1] * two[:, 5:7]
    for ours, by_concept in zip(mean.own.values(), wanted, strict=True):
        assert torch.allclose(ours, by_concept, atol=1e-6)


def test_a_mean_of_prompts_is_drawn_with_the_mean_of_changes(
    sd15: Any, cat: Concept, comfy_nodes: Any
) -> None:
    """Where both prompts have the words in one place, the mean's own rows are the mean."""

    def make(clip: Any) -> tuple[Conditioning, Conditioning]:
        one, two = encode(clip, "a <new1> cat"), encode(clip, "big <new1> cat asleep")
        return comfy_nodes.ConditioningAverage().addWeighted(one, two, 0.4)[0], encode(clip, "")

    judge(sd15, [cat], make, lambda p, n: [(p[0][0], [(cat, 1, rows(2, 4))])])


def test_a_batch_of_two_with_different_prompts(sd15: Any, cat: Concept, dog: Concept) -> None:
    def make(clip: Any) -> tuple[Conditioning, Conditioning]:
        one, two = encode(clip, "a <new1> cat")[0], encode(clip, "<new2> dog <new1>")[0]
        return [[torch.cat([one[0], two[0]]), one[1]]], encode(clip, "")

    judge(
        sd15,
        [cat, dog],
        make,
        lambda p, n: [
            (p[0][0][:1], [(cat, 1, rows(2, 4))]),
            (p[0][0][1:], [(dog, 1, rows(1, 3)), (cat, 1, rows(3, 4))]),
        ],
        batch=2,
    )


def test_strengths_and_a_long_negative_prompt(sd15: Any, cat: Concept, dog: Concept) -> None:
    routes = [Route(cat, 0.5), Route(dog, -1.5)]
    model, clip = route(sd15.model, sd15.clip, *routes)
    assert not model.patches
    texts = "<new1> cat <new2> dog", "word " * 80 + "<new2> dog"
    ours = sample(model, *(encode(clip, text) for text in texts))
    p, n = (encode(base_clip(sd15.clip, cat, dog), text) for text in texts)
    hands = [
        (p[0][0], [(cat, 0.5, rows(1, 3)), (dog, -1.5, rows(3, 5))]),
        (n[0][0], [(dog, -1.5, rows(83, 85))]),
    ]
    with by_hand(sd15.model, *hands):
        wanted = sample(sd15.model, p, n)
    close(ours, wanted, sample(sd15.model, p, n))


def test_clip_skip_after_the_node(sd15: Any, cat: Concept) -> None:
    def make(clip: Any) -> tuple[Conditioning, Conditioning]:
        skipped = clip.clone()
        skipped.clip_layer(-2)
        return encode(skipped, "a <new1> cat"), encode(skipped, "")

    judge(sd15, [cat], make, lambda p, n: [(p[0][0], [(cat, 1, rows(2, 4))])])


@pytest.mark.parametrize("first", ["lora", "route"])
def test_a_lora_before_or_after(
    comfy: Any, sd15: Any, shapes: Any, cat: Concept, first: str
) -> None:
    deltas = made_concept(shapes, seed=9).deltas
    lora = {f"diffusion_model.{k}.diff": d.dense() for k, d in deltas.items()}
    key = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    shape = sd15.clip.cond_stage_model.state_dict()[key].shape
    lora["text_encoders." + key.removesuffix(".weight") + ".diff"] = 0.01 * torch.randn(shape)

    def load(model: Any, clip: Any) -> tuple[Any, Any]:
        with torch.inference_mode():
            return comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)

    plain_model, plain_clip = load(sd15.model, base_clip(sd15.clip, cat))
    assert plain_clip.patcher.patches
    if first == "lora":
        model, clip = route(*load(sd15.model, sd15.clip), cat)
    else:
        model, clip = load(*route(sd15.model, sd15.clip, cat))
    assert clip.patcher.patches.keys() == plain_clip.patcher.patches.keys()
    texts = "a <new1> cat", ""
    ours = sample(model, *(encode(clip, text) for text in texts))
    p, n = (encode(plain_clip, text) for text in texts)
    base = sample(plain_model, p, n)
    with by_hand(sd15.model, (p[0][0], [(cat, 1.0, rows(2, 4))])):
        wanted = sample(plain_model, p, n)
    close(ours, wanted, base)


@pytest.mark.parametrize("other", ["FreeU", "PerturbedAttentionGuidance"])
def test_with_what_else_changes_a_network(comfy: Any, load: Any, other: str) -> None:
    """Before the node and behind it, as by hand on the model with the other change alone. FreeU
    acts on a level twice as wide as the first.
    """
    from comfy_extras import nodes_freelunch, nodes_pag

    wide = load("sd15_wide")
    weights = wide.model.model.diffusion_model.named_parameters()
    ends = ("attn2.to_k.weight", "attn2.to_v.weight")
    shapes = {n.removesuffix(".weight"): tuple(w.shape) for n, w in weights if n.endswith(ends)}
    cat = made_concept(shapes, "<new1>", "cat", seed=1)

    def change(model: Any) -> Any:
        if other == "FreeU":
            return nodes_freelunch.FreeU.execute(model, 1.1, 1.2, 0.9, 0.2)[0]
        return nodes_pag.PerturbedAttentionGuidance.execute(model, 3.0)[0]

    model, clip = route(wide.model, wide.clip, cat)
    texts = "a <new1> cat", ""
    behind = sample(change(model), *(encode(clip, text) for text in texts))
    model, clip = route(change(wide.model), wide.clip, cat)
    before = sample(model, *(encode(clip, text) for text in texts))
    p, n = (encode(base_clip(wide.clip, cat), text) for text in texts)
    base = sample(change(wide.model), p, n)
    assert not torch.allclose(base, sample(wide.model, p, n), atol=1e-3)  # the other change acts
    with by_hand(wide.model, (p[0][0], [(cat, 1.0, rows(2, 4))])):
        wanted = sample(change(wide.model), p, n)
    close(behind, wanted, base)
    close(before, wanted, base)


def test_a_control_net_reads_the_prompt_without_the_route(
    comfy: Any, sd15: Any, cat: Concept
) -> None:
    """Its own keys and values stay as they are; the picture's are routed."""
    from comfy.cldm.cldm import ControlNet as Network
    from comfy.controlnet import ControlNet
    from comfy.ops import disable_weight_init

    from nodes import ControlNetApplyAdvanced

    config = dict(sd15.model.model.model_config.unet_config)
    for name in ("out_channels", "disable_unet_model_creation"):
        config.pop(name, None)
    config |= {"transformer_depth": [1, 1, 0], "channel_mult": (1, 2, 4), "num_res_blocks": [1] * 3}
    config |= {"transformer_depth_middle": 0, "hint_channels": 3}
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        network = Network(**config, device="cpu", operations=disable_weight_init)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    control = ControlNet(network, load_device=torch.device("cpu"))

    def controlled(*prompts: Conditioning) -> Any:
        hint = torch.linspace(0, 1, 128 * 128 * 3).view(1, 128, 128, 3)
        return ControlNetApplyAdvanced().apply_controlnet(*prompts, control, hint, 1.0, 0.0, 1.0)

    model, clip = route(sd15.model, sd15.clip, cat)
    texts = "a <new1> cat", ""
    ours = sample(model, *controlled(*(encode(clip, text) for text in texts)))
    p, n = (encode(base_clip(sd15.clip, cat), text) for text in texts)
    base = sample(sd15.model, *controlled(p, n))
    assert not torch.allclose(base, sample(sd15.model, p, n), atol=1e-3)
    with by_hand(sd15.model, (p[0][0], [(cat, 1.0, rows(2, 4))])):
        wanted = sample(sd15.model, *controlled(p, n))
    close(ours, wanted, base)


def test_weights_that_are_cast_when_they_are_needed(sd15: Any, cat: Concept) -> None:
    """As low-memory modes do: every layer's weights come with its input."""
    model, clip = route(sd15.model, sd15.clip, cat)
    prompts = encode(clip, "a <new1> cat"), encode(clip, "")
    wanted, base = sample(model, *prompts), sample(sd15.model, *prompts)
    network = sd15.model.model.diffusion_model
    casting = [m for m in network.modules() if hasattr(m, "comfy_cast_weights")]
    before = [m.comfy_cast_weights for m in casting]
    assert len(casting) > 100
    try:
        for module in casting:
            module.comfy_cast_weights = True
        ours = sample(model, *prompts)
    finally:
        for module, cast in zip(casting, before, strict=True):
            module.comfy_cast_weights = cast
    close(ours, wanted, base)


def test_two_nodes_in_a_row_are_one_node_with_both(sd15: Any, cat: Concept, dog: Concept) -> None:
    texts = "a <new1> cat and a <new2> dog", "<new2>"
    together = route(sd15.model, sd15.clip, cat, dog)
    in_a_row = route(*route(sd15.model, sd15.clip, cat), dog)
    pictures = [
        sample(model, *(encode(clip, text) for text in texts))
        for model, clip in (together, in_a_row)
    ]
    model, clip = route(sd15.model, sd15.clip, cat)
    close(*pictures, sample(model, *(encode(clip, t) for t in texts)))


def test_a_route_after_an_applied_concept_adds_to_it(sd15: Any, cat: Concept, dog: Concept) -> None:
    from custom_diffusion.host.comfyui.apply import apply_concept

    with torch.inference_mode():
        applied, knowing = apply_concept(sd15.model, sd15.clip, dog, 1.0)
    model, clip = route(applied, knowing, cat)
    texts = "a <new1> cat and a <new2> dog", ""
    ours = sample(model, *(encode(clip, text) for text in texts))
    p, n = (encode(base_clip(knowing, cat), text) for text in texts)
    base = sample(applied, p, n)
    with by_hand(sd15.model, (p[0][0], [(cat, 1.0, rows(2, 4))])):
        wanted = sample(applied, p, n)
    close(ours, wanted, base)


def test_nothing_stays_on_the_model(sd15: Any, cat: Concept) -> None:
    """Neither after sampling, nor after an error in it, nor in another clone's pictures."""
    knowing = base_clip(sd15.clip, cat)
    prompts = encode(knowing, "a <new1> cat"), encode(knowing, "")
    before = sample(sd15.model, *prompts)
    model, clip = route(sd15.model, sd15.clip, cat)
    routed = encode(clip, "a <new1> cat"), encode(clip, "")
    assert not torch.equal(sample(model, *routed), before)

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    broken = model.clone()
    broken.set_model_unet_function_wrapper(fail)
    with pytest.raises(RuntimeError, match="stop"):
        sample(broken, *routed)
    assert torch.equal(sample(sd15.model, *prompts), before)
    assert torch.equal(sample(sd15.model, *routed), before)  # marked prompts, a model without
    network = sd15.model.model.diffusion_model
    assert not any(module._forward_hooks for module in network.modules())
    assert not sd15.model.wrappers.get("apply_model") and not sd15.model.patches
    assert not any(isinstance(t, MarkedFeatures) for t in [encode(sd15.clip, "cat")[0][0]])


def test_the_same_twice_and_after_unloading(comfy: Any, sd15: Any, cat: Concept) -> None:
    model, clip = route(sd15.model, sd15.clip, cat)
    prompts = encode(clip, "a <new1> cat"), encode(clip, "")
    first = sample(model, *prompts)
    with torch.inference_mode():
        comfy.model_management.unload_all_models()
    assert torch.equal(sample(model.clone(), *prompts), first)


def test_hooked_conditioning(comfy: Any, sd15: Any, shapes: Any, cat: Concept) -> None:
    """A LoRA as a hook on the positive side alone, so both halves run apart."""
    import comfy.hooks

    lora = {
        f"diffusion_model.{k}.diff": d.dense()
        for k, d in made_concept(shapes, seed=9).deltas.items()
    }

    def hooked(conditioning: Conditioning) -> Conditioning:
        group = comfy.hooks.create_hook_lora(lora, 1.0, 1.0)
        return comfy.hooks.set_hooks_for_conditioning(conditioning, group)

    def make(clip: Any) -> tuple[Conditioning, Conditioning]:
        with torch.inference_mode():
            return hooked(encode(clip, "a <new1> cat")), encode(clip, "<new1>")

    judge(
        sd15,
        [cat],
        make,
        lambda p, n: [(p[0][0], [(cat, 1, rows(2, 4))]), (n[0][0], [(cat, 1, rows(1, 2))])],
    )


def test_sd2(load: Any) -> None:
    loaded = load("sd2_v")
    weights = loaded.model.model.diffusion_model.named_parameters()
    shapes = {n.removesuffix(".weight"): tuple(w.shape) for n, w in weights if ".attn2.to_" in n}
    shapes = {n: s for n, s in shapes.items() if n.endswith(("to_k", "to_v"))}
    cat = made_concept(shapes, family="sd2", scale=0.01)
    judge(
        loaded,
        [cat],
        lambda clip: (encode(clip, "a (<new1> cat:1.1) !"), encode(clip, "")),
        lambda p, n: [(p[0][0], [(cat, 1, rows(2, 4))])],
    )


def test_sdxl(comfy: Any, embeddings_folder: Path) -> None:
    model, clip = comfy_xl_model(comfy), comfy_xl_clip(comfy, [str(embeddings_folder)])
    weights = model.model.diffusion_model.named_parameters()
    shapes = {
        n.removesuffix(".weight"): tuple(w.shape)
        for n, w in weights
        if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }
    cat = made_concept(shapes, family="sdxl")
    loaded = type("Loaded", (), {"model": model, "clip": clip})

    def make(clip: Any) -> tuple[Conditioning, Conditioning]:
        tokens = clip.tokenize("a <new1> cat")
        tokens["g"] = clip.tokenize("cat, <new1> cat")["g"]  # as the node of two prompts does
        with torch.inference_mode():
            return clip.encode_from_tokens_scheduled(tokens), encode(clip, "<new1> cat " * 40)

    negative = {77 * c + r: 1.0 for c, end in ((0, 76), (1, 6)) for r in range(1, end)}
    judge(
        loaded,
        [cat],
        make,
        lambda p, n: [
            (p[0][0], [(cat, 1, {2: 1.0, 3: 1.0, 4: 1.0})]),
            (n[0][0], [(cat, 1, negative)]),
        ],
    )


def test_a_compiled_network_has_the_route(sd15: Any, cat: Concept) -> None:
    """The base first, with the same network: a compiled function must not be taken for another."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model, clip = route(sd15.model, sd15.clip, cat)
    prompts = encode(clip, "a <new1> cat"), encode(clip, "")
    wanted, base = sample(model, *prompts, steps=1), sample(sd15.model, *prompts, steps=1)
    compiled = []
    for one in (sd15.model, model, sd15.model, model):
        clone = one.clone()
        set_torch_compile_wrapper(clone, backend="eager")
        compiled.append(sample(clone, *prompts, steps=1))
    torch._dynamo.reset()
    for picture, expected in zip(compiled, (base, wanted) * 2, strict=True):
        assert torch.allclose(picture, expected, atol=1e-4)
    assert not torch.allclose(base, wanted, atol=1e-2)


def test_without_the_words_it_is_the_base_model_and_says_so(
    sd15: Any, cat: Concept, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "custom_diffusion")
    model, clip = route(sd15.model, sd15.clip, cat)
    prompts = [encode(clip, text) for text in ("a cat", "")]
    assert torch.equal(sample(model, *prompts), sample(sd15.model, *prompts))
    assert "No prompt has the words of <new1> cat" in caplog.text


def test_prompts_of_another_clip_are_an_error(sd15: Any, cat: Concept) -> None:
    model, clip = route(sd15.model, sd15.clip, cat)
    with pytest.raises(IncompatibleModelError, match=r"No prompt was encoded.*Connect the CLIP"):
        sample(model, encode(sd15.clip, "a cat"), encode(sd15.clip, ""))
    sample(model, encode(clip, "a <new1> cat"), encode(sd15.clip, ""))


def test_what_cannot_be_followed_is_dropped_with_a_warning(
    sd15: Any, cat: Concept, caplog: pytest.LogCaptureFixture
) -> None:
    _, clip = route(sd15.model, sd15.clip, cat)
    features = encode(clip, "a <new1> cat")[0][0]
    changed = torch.tanh(features)
    assert type(changed) is Tensor
    assert "went through 'tanh'" in caplog.text
    assert type(copy.deepcopy(features)) is MarkedFeatures


def test_wrong_concepts_and_models_are_refused(
    comfy: Any, sd15: Any, load: Any, shapes: Any, cat: Concept
) -> None:
    with pytest.raises(TokenError, match="already taken"):
        route(sd15.model, sd15.clip, cat, made_concept(shapes, seed=5))
    with pytest.raises(IncompatibleModelError, match="No CLIP was given"):
        route(sd15.model, None, cat)
    with pytest.raises(IncompatibleModelError, match="SDXLRefinerClipModel"):
        route(sd15.model, comfy_refiner_clip(comfy), cat)
    for concept in (cat, replace(cat, tokens=(), constraint_prompts=("cat",))):
        with pytest.raises(IncompatibleModelError, match=r"encoders clip_l; this.* clip_h"):
            route(sd15.model, load("sd2_v").clip, concept)
    with pytest.raises(IncompatibleModelError, match="no cross-attention"):
        route(load("dit").model, sd15.clip, cat)
    with pytest.raises(IncompatibleModelError, match="names no word"):
        route(sd15.model, sd15.clip, replace(cat, tokens=()))
    query = next(iter(shapes)).replace("to_k", "to_q").replace("to_v", "to_q")
    width = shapes[next(iter(shapes))][0]
    wide = replace(cat, deltas={**cat.deltas, query: DenseDelta(torch.zeros(width, width))})
    with pytest.raises(IncompatibleModelError, match=r"more than keys and values \(1 matrices"):
        route(sd15.model, sd15.clip, wide)


def test_what_its_user_should_know(sd15: Any, shapes: Any, cat: Concept) -> None:
    kind = replace(
        made_concept(shapes, seed=7), tokens=(), constraint_prompts=("photo of a cat",),
        scope="own words",
    )  # fmt: skip
    (model, clip, remarks) = noted(sd15.model, sd15.clip, cat, kind)
    assert len(remarks) == 2
    assert "overlap" in remarks[0] and "not trained at its own words alone" in remarks[1]
    assert noted(sd15.model, sd15.clip, replace(cat, scope="own words"))[2] == ()
    texts = "a <new1> cat, a cat", ""
    ours = sample(model, *(encode(clip, text) for text in texts))
    p, n = (encode(base_clip(sd15.clip, cat), text) for text in texts)
    hands = [(cat, 1.0, rows(2, 4)), (kind, 1.0, {3: 1.0, 6: 1.0})]
    with by_hand(sd15.model, (p[0][0], hands)):
        wanted = sample(sd15.model, p, n)
    close(ours, wanted, sample(sd15.model, p, n))


def test_the_pack_sees_the_text_model_behind_the_marks(sd15: Any, cat: Concept) -> None:
    from custom_diffusion.host.comfyui.models.text import text_encoder

    _, clip = route(sd15.model, sd15.clip, cat)
    encoder = text_encoder(clip)
    with torch.no_grad():
        features = encoder.encode(encoder.pad([encoder.tokenize("a <new1> cat")]))
    assert torch.allclose(
        features, encode(clip, "a <new1> cat")[0][0].as_subclass(Tensor), atol=1e-4
    )


def test_in_a_workflow(server: ComfyServer, shapes: Any, cat: Concept, dog: Concept) -> None:
    folder = server.models / "custom_diffusion"
    folder.mkdir(parents=True, exist_ok=True)
    graph: Graph = draw("a <new1> cat and a <new2> dog")
    for concept, name in ((cat, "routed_cat"), (dog, "routed_dog")):
        write_concept(concept, folder / f"{name}.safetensors")
        graph[name] = node("LoadConcept", concept_name=f"{name}.safetensors", rename_token="")
    graph["routed"] = node(
        "RouteConcepts",
        model=["checkpoint", 0],
        clip=["checkpoint", 1],
        **{
            "concepts": "2",
            "concepts.concept_1": ["routed_cat", 0],
            "concepts.strength_1": 1.0,
            "concepts.concept_2": ["routed_dog", 0],
            "concepts.strength_2": 0.8,
        },
    )
    graph["sampler"]["inputs"]["model"] = ["routed", 0]
    for prompt in ("positive", "negative"):
        graph[prompt]["inputs"]["clip"] = ["routed", 1]
    outputs = server.run(graph)["outputs"]
    assert outputs["image"]["images"]
    (shown,) = outputs["routed"]["custom_diffusion"]
    assert [row[1] for row in shown["table"]] == ["acts at", "<new1> cat", "<new2> dog"]
    assert len(shown["warnings"]) == 2
