"""Regions: where they are, and attention that is computed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from custom_diffusion.composition.masks import RegionError, box, feathered, shared
from custom_diffusion.composition.regions import Region
from custom_diffusion.composition.routing import Route
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import IncompatibleModelError
from custom_diffusion.concept.layers import layer_from_diffusers
from custom_diffusion.diffusion.levels import level_of
from custom_diffusion.host.diffusers.lending import text_encoder
from custom_diffusion.host.diffusers.routing import regional, route, routing
from custom_diffusion.host.diffusers.sampling import sample
from support.made_concepts import concept_for
from support.tiny_models import tiny_pipeline
from torch import Tensor

LEFT = box(0, 0, 0.5, 1)
EDGE = 8
"""Of the latents"""


class TestWhereTheyAre:
    def test_a_box_covers_its_share(self) -> None:
        assert box(0.25, 0.5, 0.5, 0.25, 4).tolist() == [
            [0, 0, 0, 0],
            [0, 0, 0, 0],
            [0, 1, 1, 0],
            [0, 0, 0, 0],
        ]
        assert box(0, 0, 0.375, 1, 4)[0].tolist() == [1, 0.5, 0, 0]
        assert box(-1, -1, 3, 3, 4).min() == 1

    @pytest.mark.parametrize("where", [(1, 0, 0.5, 1), (0, 0, 0, 1), (0, -1, 1, 0.5)])
    def test_a_box_beside_the_picture_is_refused(self, where: tuple[float, ...]) -> None:
        with pytest.raises(RegionError, match="no part in the picture"):
            box(*where)

    def test_an_edge_fades_and_the_middle_stays(self) -> None:
        soft = feathered(box(0, 0, 0.5, 1, 64), 0.25)
        row = soft[32]
        assert row[:16].min() > 0.999 and row[48:].max() < 1e-3
        assert (row.diff() <= 0).all() and abs(row[31:33].mean() - 0.5) < 0.01
        assert torch.equal(feathered(LEFT, 0), LEFT)

    def test_overlaps_are_shared(self) -> None:
        shares = shared([torch.ones(3, 5), box(0, 0, 0.5, 1, 10), 0.25 * torch.ones(7, 7)], 16)
        assert torch.allclose(shares.sum(0), torch.ones(16, 16))
        assert torch.allclose(shares[0, :, :8], torch.tensor(1 / 2.25), atol=1e-6)
        assert torch.allclose(shares[2, :, 8:], torch.tensor(0.2), atol=1e-6)

    @pytest.mark.parametrize(
        ("mask", "says"),
        [
            (torch.zeros(4, 4), "region 2 is empty"),
            (torch.full((4, 4), 2.0), "outside of 0 to 1"),
            (torch.full((4, 4), float("nan")), "outside of 0 to 1"),
        ],
    )
    def test_masks_that_are_none(self, mask: Tensor, says: str) -> None:
        with pytest.raises(RegionError, match=says):
            shared([LEFT, mask])

    @pytest.mark.parametrize(
        ("places", "size", "level"),
        [(64, (8, 8), (8, 8)), (16, (8, 8), (4, 4)), (12, (13, 9), (4, 3)), (1, (3, 2), (1, 1))],
    )
    def test_levels(self, places: int, size: tuple[int, int], level: tuple[int, int]) -> None:
        assert level_of(places, *size) == level

    def test_a_level_that_is_none(self) -> None:
        with pytest.raises(IncompatibleModelError, match="HyperTile"):
            level_of(24, 8, 8)


@pytest.fixture
def pipeline() -> Any:
    return tiny_pipeline()


@pytest.fixture
def cat(pipeline: Any) -> Concept:
    return replace(concept_for(pipeline, "<new1>", "cat", 1), scope="own words")


@pytest.fixture
def dog(pipeline: Any) -> Concept:
    return replace(concept_for(pipeline, "<new2>", "dog", 2), scope="own words")


def pictures(pipeline: Any, prompt: str, **how: Any) -> Tensor:
    return sample(pipeline, [prompt], resolution=8 * EDGE, steps=3, **how)


class TestInAPipeline:
    def test_a_region_of_all_is_the_picture_of_its_prompt(
        self, pipeline: Any, cat: Concept, dog: Concept
    ) -> None:
        wanted = pictures(pipeline, "a <new1> cat", routes=[Route(cat)])
        everywhere = Region("a <new1> cat", torch.ones(5, 7), Route(cat))
        ours = pictures(pipeline, "two <new2> dog", routes=[Route(dog)], regions=[[everywhere]])
        assert torch.allclose(ours, wanted, atol=1e-5)
        assert not torch.allclose(ours, pictures(pipeline, "two dog"), atol=1e-3)

    def test_without_a_concept(self, pipeline: Any) -> None:
        ours = pictures(pipeline, "a dog", regions=[[Region("a cat", torch.ones(4, 4))]])
        assert torch.allclose(ours, pictures(pipeline, "a cat"), atol=1e-5)

    def test_another_picture_of_the_batch_has_none(self, pipeline: Any, cat: Concept) -> None:
        here = [Region("a <new1> cat", LEFT, Route(cat))]
        both = sample(
            pipeline, ["dogs", "dogs"], regions=[here, []], seeds=[0, 0], resolution=64, steps=2
        )
        assert torch.allclose(both[1:], pictures_of_two_steps(pipeline), atol=1e-5)
        assert not torch.allclose(both[0], both[1], atol=1e-3)

    def test_nothing_stays(self, pipeline: Any, cat: Concept) -> None:
        before = pictures(pipeline, "a dog")
        pictures(pipeline, "a dog", regions=[[Region("a <new1> cat", LEFT, Route(cat))]])
        assert torch.equal(pictures(pipeline, "a dog"), before)

    @torch.no_grad()
    def test_each_place_reads_its_own_prompt(
        self, pipeline: Any, cat: Concept, dog: Concept
    ) -> None:
        """Every attention layer against itself, called once for each prompt and mixed by hand."""
        routes = [Route(cat, 0.5), Route(dog)]
        masks = [LEFT, 0.5 * box(0.25, 0, 0.75, 1)]
        prompts = ["a <new1> cat", "<new2> dog"]
        regions = [Region(*each) for each in zip(prompts, masks, routes, strict=True)]
        shares = shared(masks)
        encoder = text_encoder(pipeline)
        for one in (cat, dog):
            encoder = encoder.with_tokens(one.embeddings())

        def encode(prompt: str) -> Tensor:
            return encoder.encode(encoder.pad([encoder.tokenize(prompt)]))

        whole = "a <new1> cat and a <new2> dog"
        compared = 0
        for layer, module in pipeline.unet.named_modules():
            if not layer.endswith(".attn2"):
                continue
            x = torch.randn(1, 16, module.to_q.in_features)
            with routing(pipeline) as router, regional(pipeline, router) as attention:
                attention.sets = route(router, routes, encoder, [whole], encode(whole), [regions])
                attention.size = (4, 4)
                attention.chosen = [1]
                ours = module(x, encoder_hidden_states=encode(whole))
            outs = []
            for prompt, acting in zip([whole, *prompts], [routes, [routes[0]], [routes[1]]]):  # noqa: B905
                with routing(pipeline) as router:
                    route(router, acting, encoder, [prompt], encode(prompt))
                    outs.append(module(x, encoder_hidden_states=encode(prompt)))
            wanted = torch.zeros_like(ours)
            for place in range(16):
                row, column = divmod(place, 4)
                cells = shares[:, 128 * row : 128 * row + 128, 128 * column : 128 * column + 128]
                first, second = cells.mean((1, 2))
                parts = (1 - first - second, first, second)
                wanted[0, place] = sum(p * out[0, place] for p, out in zip(parts, outs))  # noqa: B905
            assert torch.allclose(ours, wanted, atol=1e-4)
            assert not torch.allclose(ours, outs[0], atol=1e-3)
            compared += 1
        assert compared > 1


def pictures_of_two_steps(pipeline: Any) -> Tensor:
    return sample(pipeline, ["dogs"], resolution=64, steps=2)


@torch.no_grad()
def test_a_concept_of_every_word_acts_at_every_word_of_its_region(
    pipeline: Any, cat: Concept
) -> None:
    taught = replace(cat, scope="every word")
    module_name, module = next(
        (name, m) for name, m in pipeline.unet.named_modules() if name.endswith(".attn2")
    )
    x = torch.randn(1, 16, module.to_q.in_features)
    encoder = text_encoder(pipeline).with_tokens(cat.embeddings())
    whole, own = (
        encoder.encode(encoder.pad([encoder.tokenize(text)])) for text in ("dogs", "a <new1> cat")
    )
    region = Region("a <new1> cat", torch.ones(4, 4), Route(taught))
    with routing(pipeline) as router, regional(pipeline, router) as attention:
        attention.sets = route(router, [region.route], encoder, ["dogs"], whole, [[region]])
        attention.size, attention.chosen = (4, 4), [1]
        ours = module(x, encoder_hidden_states=whole)
    for projection in ("to_k", "to_v"):
        layer = layer_from_diffusers(f"{module_name}.{projection}")
        getattr(module, projection).weight += taught.deltas[layer].dense()
    assert torch.allclose(ours, module(x, encoder_hidden_states=own), atol=1e-5)
