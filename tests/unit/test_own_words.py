"""A concept at its own words: which positions those are, its projection, its file, its route."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from custom_diffusion.cli import main
from custom_diffusion.composition.routing import Route, own_rows
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.delta import DenseDelta, LowRankDelta
from custom_diffusion.concept.file import read_concept, write_concept
from custom_diffusion.concept.prompts import own_positions
from custom_diffusion.concept.text import encode_unpadded
from custom_diffusion.host.diffusers.lending import DiffusersModels, borrowed_models, text_encoder
from custom_diffusion.host.diffusers.routing import route, routing
from custom_diffusion.host.diffusers.sampling import sample
from custom_diffusion.merge.merging import merge_concepts
from custom_diffusion.merge.projection import project_on_own_words
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.events import Event, RegularizationLeftOut
from custom_diffusion.trainer.loop import train
from custom_diffusion.trainer.prepare import prepare
from diffusers import StableDiffusionPipeline
from support.tiny_models import RESOLUTION, cat_concept, dog_concept, random_bank

CAPTIONS = ["a cat on a table", "photo of a dog", "a mug", "two trees by a river at night"]


def config(**changes: object) -> TrainConfig:
    settings = {"steps": 2, "batch_size": 2, "learning_rate": 1e-2, "resolution": RESOLUTION}
    return TrainConfig(preview_every_steps=0, **{**settings, **changes})


@pytest.fixture(scope="module")
def concept(pipeline: StableDiffusionPipeline) -> Concept:
    cat = cat_concept()
    with borrowed_models(pipeline) as models:
        return train(config(), [cat], [random_bank(cat)], models.denoiser, models.text_encoder)


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([0, 7, 8, 1], [1, 2]),
        ([0, 5, 7, 8, 5, 1], [2, 3]),
        ([0, 7, 5, 8, 1], [1]),  # another word between
        ([0, 8, 5, 1], []),  # the noun alone is everybody's
        ([0, 7, 8, 5, 8, 7, 8, 1], [1, 2, 5, 6]),
        ([0, 7, 7, 8, 1], [1, 2, 3]),
        ([0, 5, 7], [2]),  # the prompt ends before the noun
        ([], []),
    ],
)
def test_own_words_are_the_token_and_the_noun_behind_it(ids: list[int], found: list[int]) -> None:
    assert own_positions(ids, [7], [8]) == found


def test_of_longer_words_all_pieces_are_own() -> None:
    assert own_positions([0, 6, 7, 8, 9, 8, 9, 1], [6, 7], [8, 9]) == [1, 2, 3, 4]
    assert own_positions([0, 6, 7, 8, 1], [6, 7], [8, 9]) == [1, 2]  # half of the noun is not it
    assert own_positions([0, 8, 9, 5, 8, 9], [], [8, 9]) == [1, 2, 4, 5]
    assert own_positions([0, 5], [], []) == []


def test_a_concept_says_what_it_was_taught_through(concept: Concept, tmp_path: Path) -> None:
    assert concept.scope == "own words"
    read = read_concept(write_concept(concept, tmp_path / "cat.safetensors"))
    assert read.scope == "own words"
    assert replace(read, scope="every word") != read


class TestProjection:
    @pytest.fixture
    def projected(self, concept: Concept, models: DiffusersModels) -> Concept:
        return project_on_own_words(concept, models.text_encoder, captions=CAPTIONS)[0]

    def test_it_maps_its_words_as_before(
        self, concept: Concept, projected: Concept, models: DiffusersModels
    ) -> None:
        encoder = models.text_encoder.with_tokens(concept.embeddings())
        ids = encoder.tokenize("photo of a <new1> cat")
        (features,) = encode_unpadded(encoder, [ids])
        own = features[own_rows(concept, encoder, ids)]
        assert len(own) == 2
        for layer, delta in concept.deltas.items():
            wanted = delta.map_rows(own)
            error = projected.deltas[layer].map_rows(own) - wanted
            assert error.norm() < 1e-3 * wanted.norm()

    def test_it_changes_other_words_less(
        self, concept: Concept, projected: Concept, models: DiffusersModels
    ) -> None:
        features = torch.cat(
            encode_unpadded(models.text_encoder, [models.text_encoder.tokenize("a green tree")])
        )
        less, whole = (
            torch.cat([delta.map_rows(features) for delta in one.deltas.values()], 1).norm()
            for one in (projected, concept)
        )
        print(f"{less / whole:.2f} of what the whole concept changes there")
        assert less < 0.6 * whole

    @pytest.mark.parametrize("prompt", ["cat", "photo of a cat"])
    def test_the_bare_class_noun_stays_as_it_was(
        self, concept: Concept, projected: Concept, models: DiffusersModels, prompt: str
    ) -> None:
        encoder = models.text_encoder
        ids = encoder.tokenize(prompt)
        (features,) = encode_unpadded(encoder, [ids])
        noun = features[own_positions(ids, [], encoder.tokenize_words("cat"))]
        assert len(noun) == 1
        for layer, delta in concept.deltas.items():
            left = projected.deltas[layer].map_rows(noun).norm()
            assert left < 1e-4 * delta.map_rows(noun).norm()

    def test_a_noun_that_another_concept_teaches_is_no_bare_noun(
        self, concept: Concept, models: DiffusersModels
    ) -> None:
        """A kind of thing without a token, and a concept of a token before the same noun."""
        kind = replace(
            concept,
            tokens=(),
            constraint_prompts=("cat", "photo of a cat"),
            deltas={layer: DenseDelta(2 * d.dense()) for layer, d in concept.deltas.items()},
        )
        merged, report = merge_concepts([concept, kind], models.text_encoder, captions=CAPTIONS)
        assert report.conflicts == ()
        ids = models.text_encoder.tokenize("cat")
        (features,) = encode_unpadded(models.text_encoder, [ids])
        for layer, delta in kind.deltas.items():
            wanted = delta.map_rows(features[1:2])
            error = merged.deltas[layer].map_rows(features[1:2]) - wanted
            assert error.norm() < 1e-3 * wanted.norm()

    def test_its_rank_is_its_rows_and_the_rest_stays(
        self, concept: Concept, projected: Concept
    ) -> None:
        rows = 4  # token and noun, in two prompts
        for delta in projected.deltas.values():
            assert isinstance(delta, LowRankDelta) and delta.rank == rows
        assert projected.provenance == {**concept.provenance, "projected_on_rows": rows}
        for name in ("tokens", "constraint_prompts", "base_hash", "scope", "family"):
            assert getattr(projected, name) == getattr(concept, name)

    def test_projecting_twice_is_projecting_once(
        self, projected: Concept, models: DiffusersModels
    ) -> None:
        again, _ = project_on_own_words(projected, models.text_encoder, captions=CAPTIONS)
        for layer, delta in projected.deltas.items():
            error = again.deltas[layer].dense() - delta.dense()
            assert error.norm() < 1e-3 * delta.dense().norm()


class TestRegularization:
    def test_a_token_needs_none_and_is_told_so(self, models: DiffusersModels) -> None:
        cat = cat_concept(2, regularization=3)
        bank = prepare(cat, config(), models.latent_encoder, models.text_encoder)
        assert not bank.regularization and len(bank.instances) == 2
        events: list[Event] = []
        result = train(
            config(),
            [cat],
            [bank],
            models.denoiser,
            models.text_encoder,
            on_event=events.append,
        )
        assert [e for e in events if isinstance(e, RegularizationLeftOut)] == [
            RegularizationLeftOut(3)
        ]
        assert result.provenance["regularization_images"] == 0

    @pytest.mark.parametrize("changes", [{"gradient_cut": "start"}, {"method": "cross-attention"}])
    def test_what_changes_other_words_keeps_it(
        self, models: DiffusersModels, changes: dict[str, str]
    ) -> None:
        cat, settings = cat_concept(2, regularization=3), config(**changes)
        bank = prepare(cat, settings, models.latent_encoder, models.text_encoder)
        assert len(bank.regularization) == 3

    def test_a_kind_of_thing_keeps_it(self, models: DiffusersModels) -> None:
        kind = replace(cat_concept(2, regularization=3), token="", initializer="")
        bank = prepare(kind, config(), models.latent_encoder, models.text_encoder)
        assert len(bank.regularization) == 3

    def test_captions_without_the_word_change_nothing(self, models: DiffusersModels) -> None:
        """A batch of half regularization pictures learns what the other half teaches alone."""
        cat = cat_concept(2, regularization=2)
        bank = random_bank(cat)
        both, alone = config(batch_size=4, prior_weight=7), config(batch_size=4, prior_weight=0)
        one, other = (
            train(settings, [cat], [bank], models.denoiser, models.text_encoder)
            for settings in (both, alone)
        )
        for layer, delta in one.deltas.items():
            assert torch.equal(delta.dense(), other.deltas[layer].dense())


class TestRoute:
    def test_prompts_without_the_words_are_the_base_models(
        self, pipeline: StableDiffusionPipeline, concept: Concept
    ) -> None:
        prompts = ["photo of a cat", "a dog"]
        settings = {"resolution": RESOLUTION, "steps": 3}
        plain = sample(pipeline, prompts, **settings)
        assert torch.equal(plain, sample(pipeline, prompts, routes=[Route(concept)], **settings))

    def test_the_order_of_concepts_does_not_matter(
        self, pipeline: StableDiffusionPipeline, concept: Concept, models: DiffusersModels
    ) -> None:
        dog = dog_concept()
        other = train(config(), [dog], [random_bank(dog)], models.denoiser, models.text_encoder)
        routes = [Route(concept, 0.8), Route(other, 1.3)]
        prompts = ["a <new2> dog and a <new1> cat", "a <new1> cat"]
        settings = {"resolution": RESOLUTION, "steps": 3}
        one = sample(pipeline, prompts, routes=routes, **settings)
        torch.testing.assert_close(
            one, sample(pipeline, prompts, routes=routes[::-1], **settings), atol=1e-4, rtol=0
        )
        weaker = [Route(concept, 0.8), Route(other, 0.0)]
        assert not torch.allclose(one, sample(pipeline, prompts, routes=weaker, **settings))

    def test_keys_and_values_are_those_of_a_brute_force(
        self, pipeline: StableDiffusionPipeline, concept: Concept
    ) -> None:
        prompts = ["a dog and a <new1> cat on a <new1> table", "nothing of it"]
        encoder = text_encoder(pipeline).with_tokens(concept.embeddings())
        with borrowed_models(pipeline), routing(pipeline) as router, torch.no_grad():
            context = encoder.encode(encoder.pad([encoder.tokenize(p) for p in prompts]))
            route(router, [Route(concept, 0.7)], encoder, prompts, context)
            layer = next(iter(concept.deltas))
            path = models_path(pipeline, layer)
            module = pipeline.unet.get_submodule(path)
            routed = module(context)
            router.index = None
            plain = module(context)
        mask = torch.zeros(2, context.shape[1])
        mask[0, [5, 6, 9]] = 1  # <start> a dog and a <new1> cat on a <new1> table
        wanted = plain + 0.7 * mask[..., None] * (context @ concept.deltas[layer].dense().T)
        torch.testing.assert_close(routed, wanted, atol=1e-5, rtol=1e-5)


def models_path(pipeline: StableDiffusionPipeline, layer: str) -> str:
    with borrowed_models(pipeline) as models:
        return models.denoiser.projections[layer]


def test_the_command_projects_and_says_what_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "none.safetensors"
    output = ["--output", str(tmp_path / "small.safetensors")]
    assert main(["compress", str(missing), "--own-words", *output]) == 1
    assert "none.safetensors" in capsys.readouterr().err
