"""Regions in ComfyUI's own samplers, judged by networks whose cross-attention is mixed by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from custom_diffusion.composition.masks import RegionError, box
from custom_diffusion.composition.regions import Region
from custom_diffusion.composition.routing import Route
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import IncompatibleModelError, TokenError
from custom_diffusion.concept.file import write_concept
from support.comfy_server import ComfyServer
from support.comfy_xl import comfy_xl_clip, comfy_xl_model
from support.graphs import Graph, draw, node
from support.made_concepts import made_concept
from support.routed_samples import (
    Conditioning,
    base_clip,
    by_hand,
    close,
    encode,
    noted,
    route,
    sample,
)
from torch import Tensor

WHOLE = "a <new1> cat and a <new2> dog"
LEFT, RIGHT = box(0, 0, 0.5, 1), box(0.5, 0, 0.5, 1)


@pytest.fixture
def cat(shapes: Any) -> Concept:
    return replace(made_concept(shapes, "<new1>", "cat", seed=1), scope="own words")


@pytest.fixture
def dog(shapes: Any) -> Concept:
    return replace(made_concept(shapes, "<new2>", "dog", seed=2), scope="own words")


def regional(loaded: Any, prompt: str, *regions: Region) -> tuple[Any, Any, Conditioning]:
    from custom_diffusion.host.comfyui.regions import apply_regions

    with torch.inference_mode():
        applied = apply_regions(loaded.model, loaded.clip, prompt, regions)
    return applied.model, applied.clip, applied.positive


def remarks(loaded: Any, prompt: str, *regions: Region) -> tuple[str, ...]:
    from custom_diffusion.host.comfyui.regions import apply_regions

    with torch.inference_mode():
        return apply_regions(loaded.model, loaded.clip, prompt, regions).remarks


@contextmanager
def mixed_by_hand(
    model: Any, whole: Tensor, regions: Sequence[tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """Every cross-attention of the network, for the prompt of these features (n, d): of the prompts
    (n, d) of regions by their shares (h, w).
    """

    def attend(own: Any, x: Tensor, context: Tensor, **others: Any) -> Tensor:
        others.pop("value", None)
        out = own(x, context=context, **others)
        for b, rows in enumerate(context):
            if not torch.allclose(rows, whole.to(rows), atol=1e-6):
                continue
            edge = round(x.shape[1] ** 0.5)
            mixture, left = torch.zeros_like(out[b]), torch.ones(edge * edge, 1)
            for features, shares in regions:
                share = F.interpolate(shares[None, None], size=(edge, edge), mode="area")
                share = share.view(-1, 1)
                mixture += share * own(x[b : b + 1], context=features[None].to(rows), **others)[0]
                left = left - share
            out[b] = mixture + left * out[b]
        return out

    modules = [m for n, m in model.model.diffusion_model.named_modules() if n.endswith(".attn2")]
    for module in modules:
        module.forward = partial(attend, module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def test_each_place_reads_its_own_prompt_with_its_own_concept(
    sd15: Any, cat: Concept, dog: Concept
) -> None:
    """Own prompt left; right the whole one, in which the other concept is any cat. They overlap."""
    wide = box(0.25, 0, 0.75, 1)
    model, clip, positive = regional(
        sd15,
        WHOLE,
        Region("photo of a <new1> cat", LEFT, Route(cat, 0.5)),
        Region("", wide, Route(dog)),
    )
    ours = sample(model, positive, encode(clip, "<new2> dog"))

    plain = base_clip(sd15.clip, cat, dog)
    texts = (WHOLE, "photo of a <new1> cat", "a cat and a <new2> dog", "<new2> dog")
    whole, one, other, negative = (encode(plain, text)[0][0] for text in texts)
    acting = {i: 1.0 for i in (2, 3)}, {i: 1.0 for i in (6, 7)}
    over = torch.maximum(LEFT + wide, torch.ones(()))
    with (
        by_hand(
            sd15.model,
            (whole, [(cat, 0.5, acting[0]), (dog, 1, acting[1])]),
            (one, [(cat, 0.5, {4: 1.0, 5: 1.0})]),
            (other, [(dog, 1, {5: 1.0, 6: 1.0})]),
            (negative, [(dog, 1, {1: 1.0, 2: 1.0})]),
        ),
        mixed_by_hand(sd15.model, whole[0], [(one[0], LEFT / over), (other[0], wide / over)]),
    ):
        wanted = sample(sd15.model, encode(plain, WHOLE), encode(plain, "<new2> dog"))
    routed, knowing = route(sd15.model, sd15.clip, Route(cat, 0.5), dog)
    close(ours, wanted, sample(routed, encode(knowing, WHOLE), encode(knowing, "<new2> dog")))


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (13, 9)])
def test_a_region_of_all_is_the_picture_of_its_prompt(
    sd15: Any, cat: Concept, dog: Concept, size: tuple[int, int]
) -> None:
    everywhere = Region("a <new1> cat", torch.ones(5, 7), Route(cat))
    model, clip, positive = regional(sd15, "two dogs on ice", everywhere)
    ours = sample(model, positive, encode(clip, ""), batch=2, size=size)
    routed, knowing = route(sd15.model, sd15.clip, cat)
    prompts = [encode(knowing, text) for text in ("a <new1> cat", "")]
    wanted = sample(routed, *prompts, batch=2, size=size)
    base = sample(sd15.model, encode(sd15.clip, "two dogs on ice"), prompts[1], 2, size=size)
    close(ours, wanted, base)


def test_a_concept_of_every_word_acts_at_every_word_of_its_region(sd15: Any, cat: Concept) -> None:
    taught = replace(cat, scope="every word")
    everywhere = Region("a <new1> cat", torch.ones(4, 4), Route(taught))
    model, clip, positive = regional(sd15, "dogs", everywhere)
    ours = sample(model, positive, encode(clip, ""))
    p, n = (encode(base_clip(sd15.clip, cat), text) for text in ("a <new1> cat", ""))
    with by_hand(sd15.model, (p[0][0], [(cat, 1, {row: 1.0 for row in range(77)})])):
        wanted = sample(sd15.model, p, n)
    close(ours, wanted, sample(sd15.model, p, n))


def test_a_concept_that_is_a_word_alone_has_a_region_once(sd15: Any, cat: Concept) -> None:
    """At every step of a sampling."""
    word = replace(cat, deltas={})
    half = Region("a <new1> cat", 0.5 * LEFT, Route(word))
    model, clip, positive = regional(sd15, "dogs", half)
    ours = sample(model, positive, encode(clip, ""), steps=3)
    plain = base_clip(sd15.clip, cat)
    whole, own = (encode(plain, text) for text in ("dogs", "a <new1> cat"))
    with mixed_by_hand(sd15.model, whole[0][0][0], [(own[0][0][0], 0.5 * LEFT)]):
        wanted = sample(sd15.model, whole, encode(plain, ""), steps=3)
    close(ours, wanted, sample(sd15.model, whole, encode(plain, ""), steps=3))


def test_nothing_stays_on_the_model(sd15: Any, cat: Concept) -> None:
    prompts = [encode(sd15.clip, text) for text in ("a cat", "")]
    before = sample(sd15.model, *prompts)
    model, clip, positive = regional(sd15, "a <new1> cat", Region("", LEFT, Route(cat)))
    first = sample(model, positive, prompts[1])
    assert torch.equal(sample(sd15.model, *prompts), before)
    assert torch.equal(sample(model, positive, prompts[1]), first)
    assert not torch.allclose(first, before, atol=1e-3)


def test_what_its_user_should_know(sd15: Any, cat: Concept, dog: Concept) -> None:
    fine = Region("", LEFT, Route(cat)), Region("", RIGHT, Route(dog))
    assert remarks(sd15, WHOLE, *fine) == ()
    (told,) = remarks(sd15, "a cat and a <new2> dog", *fine)
    assert "region 1, 'a cat and a dog', has no words of <new1> cat" in told


def test_what_cannot_be_drawn_is_refused(sd15: Any, cat: Concept, dog: Concept) -> None:
    region = Region("", LEFT, Route(cat))
    model, clip, positive = regional(sd15, "a <new1> cat", region)
    negative = encode(clip, "")
    with pytest.raises(IncompatibleModelError, match="CONDITIONING that comes out of Apply"):
        sample(model, encode(clip, "a <new1> cat"), negative)
    with pytest.raises(RegionError, match="limited to an area"):
        sample(model, [[f, {**o, "area": (8, 8, 0, 0)}] for f, o in positive], negative)
    replaced = model.clone()
    replaced.set_model_attn2_replace(lambda q, k, v, extra: q, "input", 1)
    with pytest.raises(RegionError, match="IP-Adapter"):
        sample(replaced, positive, negative)
    with pytest.raises(IncompatibleModelError, match="has regions already"):
        regional(replace(sd15, model=model), "a <new2> dog", Region("", RIGHT, Route(dog)))
    with pytest.raises(RegionError, match="9 regions were given; 1 to 8"):
        regional(sd15, WHOLE, *[region] * 9)
    with pytest.raises(TokenError, match="<new1> is already taken"):
        regional(sd15, WHOLE, region, Region("", RIGHT, Route(replace(cat, deltas=dog.deltas))))
    with pytest.raises(RegionError, match="Region 2 has no place.*<new2> dog"):
        regional(sd15, "a <new1> cat", region, Region("", None, Route(dog)))
    with pytest.raises(IncompatibleModelError, match="no regions, so there are no subjects"):
        guider(sd15.model)
    with pytest.raises(RegionError, match="empty"):
        regional(sd15, WHOLE, region, Region("", torch.zeros(8, 8), Route(dog)))
    query = next(iter(cat.deltas)).replace("to_k", "to_q").replace("to_v", "to_q")
    wide = replace(cat, deltas={query: next(iter(cat.deltas.values()))})
    with pytest.raises(IncompatibleModelError):
        regional(sd15, WHOLE, Region("", LEFT, Route(wide)))
    assert noted(sd15.model, sd15.clip, cat)[2] == ()


def guider(model: Any) -> Any:
    from custom_diffusion.host.comfyui.isolation import isolated_guider

    return isolated_guider(model, [], [], 3.0)


def test_in_a_workflow(server: ComfyServer, cat: Concept, dog: Concept) -> None:
    folder = server.models / "custom_diffusion"
    folder.mkdir(parents=True, exist_ok=True)
    graph: Graph = draw(WHOLE)
    for number, concept in enumerate((cat, dog), 1):
        write_concept(concept, folder / f"region_{number}.safetensors")
        graph[f"load_{number}"] = node(
            "LoadConcept", concept_name=f"region_{number}.safetensors", rename_token=""
        )
        graph[f"region_{number}"] = node(
            "ConceptRegion",
            concept=[f"load_{number}", 0],
            **{"prompt": "", "left": 0.5 * (number - 1), "top": 0.0, "width": 0.5, "height": 1.0},
            **{"strength": 1.0, "feather": 0.1},
        )
    graph["placed"] = node(
        "ApplyRegions",
        model=["checkpoint", 0],
        clip=["checkpoint", 1],
        prompt=WHOLE,
        **{
            "regions": "2",
            "regions.region_1": ["region_1", 0],
            "regions.region_2": ["region_2", 0],
        },
    )
    graph["region_2"]["inputs"]["place"] = "find it"
    graph["region_1"]["inputs"]["mask"] = ["left half", 0]
    graph |= {
        "nothing": node("SolidMask", value=0.0, width=96, height=64),
        "white": node("SolidMask", value=1.0, width=48, height=64),
        "left half": node(
            "MaskComposite",
            destination=["nothing", 0],
            source=["white", 0],
            **{"x": 0, "y": 0, "operation": "add"},
        ),
    }
    graph["sampler"]["inputs"] |= {"model": ["placed", 0], "positive": ["placed", 2]}
    graph["negative"]["inputs"]["clip"] = ["placed", 1]
    del graph["positive"]
    graph |= {
        "shown": node("ShowRegions", places=["placed", 3], images=["pixels", 0]),
        "sheet": node("PreviewImage", images=["shown", 0]),
        "guider": node(
            "IsolatedGuider",
            model=["placed", 0],
            positive=["placed", 2],
            negative=["negative", 0],
            **{"cfg": 5.0, "start_percent": 0.2},
        ),
        "noise": node("RandomNoise", noise_seed=1),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node(
            "BasicScheduler", model=["placed", 0], scheduler="normal", steps=2, denoise=1.0
        ),
        "apart": node(
            "SamplerCustomAdvanced",
            **{name: [name, 0] for name in ("noise", "guider", "sigmas")},
            sampler=["euler", 0],
            latent_image=graph["sampler"]["inputs"]["latent_image"],
        ),
        "joined": node("VAEDecode", samples=["apart", 0], vae=["checkpoint", 2]),
        "both": node("SaveImage", images=["joined", 0], filename_prefix="apart"),
    }
    outputs = server.run(graph)["outputs"]
    assert outputs["image"]["images"] and outputs["both"]["images"]
    assert "96 x 64 pixels is scaled" in str(outputs["region_1"]["text"])
    (shown,) = outputs["placed"]["custom_diffusion"]
    table = [row[1:] for row in shown["table"][1:]]
    assert table == [["<new1> cat", "50%"], ["<new2> dog", "found"]]
    assert shown["warnings"] == []
    assert "3 passes a step" in str(outputs["guider"]["text"])
    (shown,) = outputs["shown"]["custom_diffusion"]
    shares = [float(row[1].rstrip("%")) for row in shown["table"][1:]]
    assert shares[0] == pytest.approx(50, abs=3) and 0 < shares[1] <= 52


def apart(applied: Any, start: float, negative: Conditioning, size: tuple[int, int]) -> Tensor:
    """Two pictures by the isolated guider."""
    import comfy.samplers
    from custom_diffusion.host.comfyui.isolation import isolated_guider

    noise = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        guide = isolated_guider(applied.model, applied.positive, negative, 3.0, start)
        sampling = applied.model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 2)
        sampler = comfy.samplers.sampler_object("euler")
        zero = torch.zeros_like(noise)
        return guide.sample(noise, zero, sampler, sigmas, disable_pbar=True, seed=0).clone()


def test_on_sdxl_at_any_size(comfy: Any) -> None:
    """What is apart everywhere is the picture of its prompt, the pooled feature too; and places
    are found in each picture.
    """
    from custom_diffusion.host.comfyui.regions import apply_regions

    size = (13, 9)
    model, clip = comfy_xl_model(comfy), comfy_xl_clip(comfy, [])
    parameters = model.model.diffusion_model.named_parameters()
    shapes = {
        name.removesuffix(".weight"): tuple(weight.shape)
        for name, weight in parameters
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }
    cat = replace(made_concept(shapes, family="sdxl"), scope="own words")
    everywhere = Region("a <new1> cat on ice", torch.ones(4, 4), Route(cat))
    found = Region("", None, Route(cat))
    with torch.inference_mode():
        applied = apply_regions(model, clip, "two dogs", [everywhere])
        sought = apply_regions(model, clip, "a big <new1> cat", [found])
    ours = apart(applied, 0.0, encode(applied.clip, ""), size)
    routed, knowing = route(model, clip, cat)
    prompts = [encode(knowing, text) for text in ("a <new1> cat on ice", "")]
    wanted = sample(routed, *prompts, batch=2, size=size)
    close(ours, wanted, sample(model, encode(clip, "two dogs"), prompts[1], 2, size=size))
    assert apart(sought, 0.0, encode(sought.clip, ""), size).isfinite().all()
    shares = sought.places.of_pictures(2, *size)
    assert shares.shape == (2, 1, *size) and not torch.equal(shares[0], shares[1])
    assert 0 < shares.mean() < 1
