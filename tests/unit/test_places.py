"""Places that are found by attention, and subjects that are apart: against sums by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from custom_diffusion.composition.isolation import joined
from custom_diffusion.composition.masks import RegionError, box
from custom_diffusion.composition.places import Places, divided
from custom_diffusion.composition.regions import Region
from custom_diffusion.composition.routing import Route
from custom_diffusion.concept.concept import Concept
from custom_diffusion.host.diffusers.sampling import sample
from support.made_concepts import concept_for
from support.tiny_models import tiny_pipeline
from torch import Tensor

HEADS, WIDTH, WORDS = 2, 8, 5


def bump(x: float, y: float, edge: int = 16) -> Tensor:
    """A map (edge, edge) with a hill at a place, in shares of the edge."""
    at = (torch.arange(edge) + 0.5) / edge
    return torch.exp(-((at[None] - x) ** 2 + (at[:, None] - y) ** 2) / 0.02)


class TestDividing:
    def test_each_place_is_whose_words_it_looks_at_more_than_elsewhere(self) -> None:
        """However much a word is looked at everywhere, and however weakly."""
        maps = torch.stack([0.01 * bump(0.25, 0.5), 0.5 + 2 * bump(0.75, 0.5)])[None]
        first, second = divided(maps)[0]
        assert first.shape == (128, 128)
        assert torch.equal(first + second, torch.ones(128, 128))
        assert first[64, 32] == 1 and second[64, 96] == 1
        assert 0.3 < first.mean() < 0.7

    def test_a_concept_alone_has_what_is_above_the_mean(self) -> None:
        (mask,) = divided(bump(0.25, 0.25)[None, None], alone=True)[0]
        assert mask[32, 32] == 1 and mask[96, 96] == 0 and 0.05 < mask.mean() < 0.4

    def test_nothing_to_tell_by_is_no_error(self) -> None:
        assert divided(torch.ones(1, 2, 3, 5)).isfinite().all()


def module() -> Any:
    return SimpleNamespace(heads=HEADS)


def shares_by_hand(query: Tensor, key: Tensor, columns: list[int]) -> Tensor:
    """(p,) softmax written out, head by head."""
    size = query.shape[-1] // HEADS
    seen = torch.zeros(len(query))
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        attention = (query[:, part] @ key[:, part].T / size**0.5).softmax(-1)
        seen += attention[:, columns].sum(-1) / HEADS
    return seen


class TestFinding:
    def test_is_what_attention_says_of_each_picture(self) -> None:
        generator = torch.Generator().manual_seed(0)
        places = Places([None, None], found_at=0.5)
        columns = [[1, 2], [3]]
        sums = torch.zeros(3, 2, 16)
        for _ in range(4):  # layers or steps of one size
            queries = 3 * torch.randn(3, 16, WIDTH, generator=generator)
            keys = torch.randn(3, WORDS, WIDTH, generator=generator)
            places.record(module(), queries, keys, columns, (4, 4))
            for b in range(3):
                for r in range(2):
                    sums[b, r] += shares_by_hand(queries[b], keys[b], columns[r])
        places.settle(0.4)
        assert places.seeks and not places.shares.any()
        places.settle(0.5)
        assert not places.seeks
        expected = divided(sums.view(3, 2, 4, 4) / 4)
        assert torch.equal(places.shares, expected)
        assert not torch.equal(places.shares[0], places.shares[1])
        assert places.of_pictures(3, 20, 30).shape == (3, 2, 20, 30)
        with pytest.raises(RegionError, match="2 pictures were given, and regions were found in 3"):
            places.of_pictures(2, 8, 8)
        places.begin()
        with pytest.raises(RegionError, match="were not found"):
            places.of_pictures(3, 8, 8)

    def test_takes_nothing_of_what_is_given(self) -> None:
        places = Places([box(0, 0, 0.5, 1), None])
        assert places.at(4, 4)[0][0][0].tolist() == [0, 1, 4, 5, 8, 9, 12, 13]
        assert not len(places.at(4, 4)[0][1][0])
        queries, keys = torch.randn(1, 16, WIDTH), torch.randn(1, WORDS, WIDTH)
        places.record(module(), queries, keys, [[1]], (4, 4))
        places.settle(0.9)
        given, found = places.shares_at(4, 4)[0]
        assert torch.equal(given, torch.tensor([[1.0, 1, 0, 0]] * 4))
        assert not found[:, :2].any() and found[:, 2:].any()


class TestJoining:
    def test_is_a_mixture_of_predictions(self) -> None:
        whole, one, two = torch.randn(3, 2, 4, 3, 5)
        shares = torch.rand(2, 2, 3, 5) / 2
        expected = torch.zeros_like(whole)
        for b, c, y, x in torch.cartesian_prod(*(torch.arange(n) for n in whole.shape)).tolist():
            a, s = shares[b, 0, y, x], shares[b, 1, y, x]
            left = 1 - a - s
            expected[b, c, y, x] = (
                a * one[b, c, y, x] + s * two[b, c, y, x] + left * whole[b, c, y, x]
            )
        assert torch.allclose(joined(whole, [one, two], shares), expected, atol=1e-6)
        same = joined(whole, [one, two], shares[:1])
        assert torch.allclose(same[0], expected[0], atol=1e-6)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def cat(pipeline: Any) -> Concept:
    return replace(concept_for(pipeline, "<new1>", "cat", 1), scope="own words")


@pytest.fixture(scope="module")
def dog(pipeline: Any) -> Concept:
    return replace(concept_for(pipeline, "<new2>", "dog", 2), scope="own words")


def pictures(pipeline: Any, prompts: list[str], **how: Any) -> Tensor:
    return sample(pipeline, prompts, resolution=64, steps=4, seeds=[0] * len(prompts), **how)


class TestInAPipeline:
    def test_what_is_apart_everywhere_is_the_picture_of_its_prompt(
        self, pipeline: Any, cat: Concept, dog: Concept
    ) -> None:
        alone = pictures(pipeline, ["a <new1> cat"], routes=[Route(cat)])
        region = Region("a <new1> cat", torch.ones(5, 7), Route(cat))
        whole = ["a <new2> dog", "dogs"]
        apart = pictures(
            pipeline, whole, routes=[Route(dog)], regions=[[region], []], isolated_from=0.0
        )
        assert torch.allclose(apart[:1], alone, atol=1e-5)
        assert torch.allclose(apart[1:], pictures(pipeline, ["dogs"]), atol=1e-5)

    def test_regions_follow_what_was_found(self, pipeline: Any, cat: Concept, dog: Concept) -> None:
        """From there on the picture is another than a routed one, and not before."""
        prompt = "a <new1> cat and a <new2> dog"
        routes = [Route(cat), Route(dog)]
        routed = pictures(pipeline, [prompt] * 2, routes=routes)
        regions = [[Region("", None, route) for route in routes]] * 2
        found: list[Places] = []
        ours = pictures(
            pipeline, [prompt] * 2, regions=regions, found_at=0.5, on_places=found.extend
        )
        assert [place.seeks for place in found] == [False, False]
        assert torch.allclose(found[0].shares.sum(1), torch.ones(1, 128, 128))
        assert not torch.allclose(ours, routed, atol=1e-4)
        late = pictures(pipeline, [prompt] * 2, regions=regions, found_at=1.0)
        assert torch.allclose(late, routed, atol=1e-5)

    def test_a_place_is_found_by_words_of_the_prompt(self, pipeline: Any, cat: Concept) -> None:
        with pytest.raises(RegionError, match="has none"):
            pictures(pipeline, ["a cat"], regions=[[Region("", None, Route(cat))]])
