"""Does the pack do what it is for? The real trainer and the real merge on the miniature, judged.

The thresholds lie between what a working trainer reaches and what is left of it when keys and
values do not learn, when the embedding does not, or when the loss has the wrong target
(docs/fidelity.md has the figures). On the miniature either keys and values or the word alone can
learn a concept, so each is asked what it contributes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.file import read_concept, write_concept
from custom_diffusion.merge.merging import merge_concepts
from custom_diffusion.merge.projection import project_on_own_words
from custom_diffusion.miniature.check import caption_table, concept_table, prompt_following
from custom_diffusion.miniature.judge import both_present
from custom_diffusion.miniature.laboratory import (
    Laboratory,
    Score,
    Subject,
    evaluation_prompts,
    pair_of_subjects,
)
from custom_diffusion.miniature.model import CONFIG, EVERY_WORD
from custom_diffusion.miniature.world import world_captions

pytestmark = pytest.mark.slow

PAIR = 50
"""Any pair that nothing was tuned on"""
LEARNT, PART, BOTH = 0.6, 0.2, 0.4


@pytest.fixture(scope="module")
def lab() -> Laboratory:
    return Laboratory(pictures_per_prompt=2, class_pictures=16)


@pytest.fixture(scope="module")
def pair() -> tuple[Subject, Subject]:
    return pair_of_subjects(PAIR, seed=0)


@pytest.fixture(scope="module")
def concepts(
    lab: Laboratory, pair: tuple[Subject, Subject], tmp_path_factory: pytest.TempPathFactory
) -> list[Concept]:
    """Both, taught apart, projected as a training does, and back from their files."""
    folder = tmp_path_factory.mktemp("concepts")
    taught = [
        project_on_own_words(lab.teach([one], CONFIG), lab.encoder, captions=world_captions())[0]
        for one in pair
    ]
    return [
        read_concept(write_concept(concept, folder / f"{number}.safetensors"))
        for number, concept in enumerate(taught)
    ]


@pytest.fixture(scope="module")
def alone(lab: Laboratory, pair: tuple[Subject, Subject], concepts: list[Concept]) -> list[Score]:
    """Of each concept by itself."""
    return [lab.score([one], concept, seed=1) for one, concept in zip(pair, concepts, strict=True)]


def without_deltas(concept: Concept) -> Concept:
    return replace(concept, deltas={})


@pytest.mark.parametrize(
    "objects, least", [(1, 0.9), pytest.param(2, 0.8, marks=pytest.mark.any_version)]
)
def test_the_model_draws_what_unseen_captions_say(
    lab: Laboratory, objects: int, least: float
) -> None:
    assert prompt_following(lab, objects, count=60) >= least


@pytest.mark.any_version
def test_the_judge_tells_concepts_from_almost_concepts(lab: Laboratory) -> None:
    scores = concept_table(lab.recognizer, concepts=10, pictures=10)
    assert scores.pop("the concept") > 0.85
    assert scores.pop("another shape") < 0.05
    assert scores.pop("no object") < 0.01
    assert all(score < 0.75 for score in scores.values())
    captions = caption_table(lab.recognizer, pictures=100)
    right, followed = captions.pop("as the caption says")
    assert right > 0.9 and followed > 0.95
    assert all(score < right - 0.05 for score, _ in captions.values())


@pytest.mark.any_version
def test_a_concept_is_learnt_and_keys_and_values_take_part(
    lab: Laboratory, pair: tuple[Subject, Subject], concepts: list[Concept], alone: list[Score]
) -> None:
    for one, concept, score in zip(pair, concepts, alone, strict=True):
        learnt = score.image_alignment
        assert learnt > LEARNT
        assert lab.likeness(one, without_deltas(concept), seed=1) < learnt - PART


@pytest.mark.any_version
def test_a_word_alone_learns(lab: Laboratory, pair: tuple[Subject, Subject]) -> None:
    concept = lab.teach(pair[:1], replace(EVERY_WORD, method="textual inversion", steps=150))
    assert not concept.deltas
    assert lab.likeness(pair[0], concept, seed=1) > LEARNT


@pytest.mark.any_version
def test_the_class_is_not_the_concept(alone: list[Score]) -> None:
    for score in alone:
        assert score.class_alignment < score.image_alignment - 0.25


@pytest.mark.any_version
def test_a_merge_keeps_both_concepts(
    lab: Laboratory, pair: tuple[Subject, Subject], concepts: list[Concept]
) -> None:
    merged, _ = merge_concepts(concepts, lab.encoder, captions=world_captions())
    for one in pair:
        assert lab.likeness(one, merged, seed=1) > LEARNT - 0.1
    prompts, _ = evaluation_prompts(pair, lab.pictures_per_prompt)
    seen = lab.recognizer.look(lab.draw(prompts, merged, seed=1))
    assert both_present(seen, [one.look for one in pair]).double().mean() > BOTH


@pytest.mark.any_version
def test_routed_concepts_are_both_in_the_picture_and_the_class_stays(
    lab: Laboratory, pair: tuple[Subject, Subject], concepts: list[Concept]
) -> None:
    routed = lab.score(pair, None, seed=1, routed=concepts)
    assert routed.both_present is not None and routed.both_present > BOTH
    assert (routed.drift, routed.class_alignment) == lab.class_drift(pair, None, seed=1)
