"""Attention recorded in ComfyUI's own samplers, judged by shares that are computed by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from custom_diffusion.attention.maps import AttentionError
from custom_diffusion.composition.masks import box
from custom_diffusion.composition.regions import Region
from custom_diffusion.composition.routing import Route
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import IncompatibleModelError
from custom_diffusion.concept.file import write_concept
from support.comfy_server import ComfyServer
from support.graphs import Graph, draw, node
from support.made_concepts import made_concept
from support.routed_samples import encode, route, sample
from torch import Tensor

PROMPT = "photo of a (<new1> cat:1.2) and a dog"


@pytest.fixture
def cat(shapes: Any) -> Concept:
    return replace(made_concept(shapes, "<new1>", "cat", seed=1), scope="own words")


def watched(model: Any, clip: Any, prompt: str, words: str) -> Any:
    from custom_diffusion.host.comfyui.attention import watch_attention

    with torch.inference_mode():
        return watch_attention(model, clip, prompt, words)


@contextmanager
def shares_by_hand(model: Any, whole: Tensor, columns: Sequence[list[int]]) -> Iterator[Any]:
    """Places → shares (words, places) that every cross-attention pays in the prompt with these
    features (n, d), call by call.
    """
    seen: dict[int, list[Tensor]] = {}

    def attend(own: Any, module: Any, x: Tensor, context: Tensor, **others: Any) -> Tensor:
        for b, (row, features) in enumerate(zip(x, context, strict=True)):
            if torch.allclose(features[: len(whole)], whole.to(features), atol=1e-6):
                q, k = (
                    part.float().view(len(part), module.heads, -1).transpose(0, 1)
                    for part in (module.to_q(row[None])[0], module.to_k(context)[b])
                )
                shares = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(0)
                words = torch.stack([shares[:, own_].sum(-1) for own_ in columns])
                seen.setdefault(len(row), []).append(words)
        return own(x, context=context, **others)

    modules = [m for n, m in model.model.diffusion_model.named_modules() if n.endswith(".attn2")]
    for module in modules:
        module.forward = partial(attend, module.forward, module)
    try:
        yield seen
    finally:
        for module in modules:
            del module.forward


def test_maps_are_what_the_prompt_pays_to_its_words(sd15: Any, cat: Concept) -> None:
    model, clip = route(sd15.model, sd15.clip, cat)
    watching, positive, recorder = watched(model, clip, PROMPT, "")
    assert [(w.text, list(w.positions)) for w in recorder.words] == [("<new1> cat", [4, 5])]
    watching, positive, recorder = watched(model, clip, PROMPT, "<new1> cat, dog\nphoto")
    columns = [[4, 5], [8], [1]]
    negative = encode(clip, "a dog")
    with shares_by_hand(sd15.model, positive[0][0][0].as_subclass(Tensor), columns) as seen:
        ours = sample(watching, positive, negative, steps=3)
    for (h, w), mean in recorder.maps().means.items():
        assert h == w
        by_hand = torch.stack(seen[h * w])
        layers = len(by_hand) // 3
        found = [part for part in mean if part.any()]
        assert len(found) == 3  # a part for each step
        for step, part in enumerate(found):
            wanted = by_hand[step * layers : (step + 1) * layers].mean(0)
            assert torch.allclose(part[0].flatten(1), wanted, atol=2e-5)
    plain = sample(model, encode(clip, PROMPT), negative, steps=3)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("size", [(24, 16), (12, 9)])
def test_every_picture_has_its_own_and_the_last_sampling_counts(
    sd15: Any, size: tuple[int, int]
) -> None:
    watching, positive, recorder = watched(sd15.model, sd15.clip, "a cat and a dog", "cat")
    negative = encode(sd15.clip, "")
    sample(watching, positive, negative)
    together = sample(watching, positive, negative, batch=2, size=size)
    maps = recorder.maps()
    assert maps.latents == size
    both = maps.between()
    assert both.shape == (2, 1, *size)
    sample(watching, positive, negative, batch=1, size=size)
    one = recorder.maps().between()
    assert one.shape == (1, 1, *size) and len(together) == 2
    assert torch.allclose(one[0], both[0], atol=1e-4)
    assert not torch.allclose(both[0], both[1], atol=1e-4)


def test_another_positive_prompt_beside_it_is_not_recorded(sd15: Any) -> None:
    watching, positive, recorder = watched(sd15.model, sd15.clip, "a cat", "cat")
    negative = encode(sd15.clip, "")
    other = encode(sd15.clip, "two dogs on ice")
    sample(watching, [*other, *positive], negative, steps=1)
    beside = recorder.maps().between()
    sample(watching, positive, negative, steps=1)
    assert torch.allclose(recorder.maps().between(), beside, atol=1e-5)
    sample(watching, other, negative, steps=1)
    with pytest.raises(AttentionError, match="No attention was recorded"):
        recorder.maps()


def test_a_prompt_for_an_area_is_refused(sd15: Any) -> None:
    watching, positive, _ = watched(sd15.model, sd15.clip, "a cat", "cat")
    part = [[features, {**more, "area": (8, 8, 0, 0)}] for features, more in positive]
    with pytest.raises(AttentionError, match="limited to an area"):
        sample(watching, part, encode(sd15.clip, ""), steps=1)


def test_beside_regions_the_whole_prompt_is_recorded(sd15: Any, cat: Concept) -> None:
    from custom_diffusion.host.comfyui.regions import apply_regions

    with torch.inference_mode():
        applied = apply_regions(
            sd15.model, sd15.clip, "a <new1> cat", [Region("", box(0, 0, 0.5, 1), Route(cat))]
        )
    clip = applied.clip
    watching, positive, recorder = watched(applied.model, clip, "a <new1> cat", "")
    marked = [
        [features, {**ours, **theirs}]
        for (features, ours), (_, theirs) in zip(positive, applied.positive, strict=True)
    ]
    sample(watching, marked, encode(clip, ""), steps=2)
    counts = recorder.maps().counts.values()
    layers = [n for n, _ in sd15.model.model.diffusion_model.named_modules() if n[-5:] == "attn2"]
    assert sum(float(count.sum()) for count in counts) == 2 * len(layers)


def test_what_cannot_be_watched(sd15: Any, load: Any, cat: Concept) -> None:
    with pytest.raises(AttentionError, match="No words to watch"):
        watched(sd15.model, sd15.clip, "a cat", "")
    with pytest.raises(AttentionError, match="'horse' is not in the prompt 'a cat'"):
        watched(sd15.model, sd15.clip, "a cat", "cat\nhorse")
    with pytest.raises(IncompatibleModelError, match="no cross-attention to watch"):
        watched(load("dit").model, sd15.clip, "a cat", "cat")
    *_, recorder = watched(sd15.model, sd15.clip, "a cat", "cat")
    with pytest.raises(AttentionError, match="No attention was recorded"):
        recorder.maps()


def test_in_a_workflow(server: ComfyServer, cat: Concept) -> None:
    folder = server.models / "custom_diffusion"
    folder.mkdir(parents=True, exist_ok=True)
    write_concept(cat, folder / "watched.safetensors")
    graph: Graph = draw(PROMPT)
    graph["load"] = node("LoadConcept", concept_name="watched.safetensors", rename_token="")
    graph["apply"] = node(
        "RouteConcepts",
        model=["checkpoint", 0],
        clip=["checkpoint", 1],
        **{"concepts": "1", "concepts.concept_1": ["load", 0], "concepts.strength_1": 1.0},
    )
    graph["watch"] = node(
        "WatchAttention", model=["apply", 0], clip=["apply", 1], prompt=PROMPT, words=""
    )
    graph["sampler"]["inputs"] |= {"model": ["watch", 0], "positive": ["watch", 1]}
    graph["negative"]["inputs"]["clip"] = ["apply", 1]
    del graph["positive"]
    images = graph["image"]["inputs"]["images"]
    shown = {"start": 0.0, "end": 1.0, "resolution": "all"}
    graph["show"] = node("ShowAttention", attention=["watch", 2], images=images, **shown)
    graph["sheet"] = node("PreviewImage", images=["show", 0])
    entry = server.run(graph)
    assert entry["outputs"]["watch"]["text"] == ["Watches <new1> cat."]
    first = server.images(entry, "sheet")[0]
    graph["sampler"]["inputs"]["seed"] = 8
    assert (server.images(server.run(graph), "sheet")[0] != first).any()
