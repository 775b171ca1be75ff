"""Several concepts in one picture: `python -m custom_diffusion.miniature.pairs`.

Both concepts of a pair are taught apart and together, at their own words or through every word, and
then routed or brought into the weights. docs/fidelity.md has the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..concept.concept import Concept
from ..merge.merging import merge_concepts
from ..merge.projection import project_on_own_words
from .cells import markdown_table, options, run_command
from .judge import bleeds, both_present, image_alignment, text_alignment
from .laboratory import Laboratory, Subject, evaluation_prompts, pair_of_subjects
from .model import CONFIG, EVERY_WORD
from .recognizer import Seen
from .world import world_captions

_TITLE = "pairs"
_COLUMNS = {
    "each alone": ("alone", 2),
    "both present": ("both_present", 2),
    "V1* first": ("first_first", 2),
    "V2* first": ("second_first", 2),
    "bleed": ("bleed", 2),
    "text": ("text_alignment", 2),
    "bare class": ("class_alignment", 2),
    "drift": ("drift", 0),
}


@dataclass(frozen=True)
class Together:
    """Means over the pictures of one pair."""

    alone: float
    """Image alignment of each concept in pictures that ask for it alone"""
    both_present: float
    first_first: float
    """Both present where the first concept's word stands first in the prompt"""
    second_first: float
    bleed: float
    text_alignment: float
    class_alignment: float
    drift: float


Row = tuple[str, str, Together]


def own_words(number: int, seed: int) -> list[Row]:
    """The pack's recipe on pair `number` with one training seed."""
    return list(_own_words(Laboratory(), number, seed))


def every_word(number: int, seed: int) -> list[Row]:
    """Version 0.1's recipe, and the same at the rate of the present one."""
    return list(_every_word(Laboratory(), number, seed))


def _own_words(lab: Laboratory, number: int, seed: int) -> Iterator[Row]:
    pair, captions = pair_of_subjects(number, seed), world_captions()
    config = replace(CONFIG, seed=seed)
    base = _judge(lab, pair, seed)
    yield _TITLE, "base model", base
    apart = [lab.teach([one], config) for one in pair]
    yield _TITLE, "own words, routed", _judge(lab, pair, seed, routed=apart, bare=base)
    merged, _ = merge_concepts(apart, lab.encoder, captions=captions)
    yield _TITLE, "own words, merged", _judge(lab, pair, seed, merged)
    joint = lab.teach(pair, replace(config, steps=2 * config.steps))
    yield _TITLE, "own words, joint, routed", _judge(lab, pair, seed, routed=[joint], bare=base)
    saved, _ = project_on_own_words(joint, lab.encoder, captions=captions)
    yield _TITLE, "own words, joint, in the weights", _judge(lab, pair, seed, saved)


def _every_word(lab: Laboratory, number: int, seed: int) -> Iterator[Row]:
    pair, captions = pair_of_subjects(number, seed), world_captions()
    base = _judge(lab, pair, seed)
    for rate in (EVERY_WORD.learning_rate, CONFIG.learning_rate):
        config = replace(EVERY_WORD, seed=seed, learning_rate=rate)
        apart = [lab.teach([one], config) for one in pair]
        merged, _ = merge_concepts(apart, lab.encoder, captions=captions)
        name = f"every word at {rate:.0e}".replace("e-0", "e-")
        yield _TITLE, f"{name}, merged", _judge(lab, pair, seed, merged)
        yield _TITLE, f"{name}, routed", _judge(lab, pair, seed, routed=apart, bare=base)


def _judge(
    lab: Laboratory,
    pair: tuple[Subject, Subject],
    seed: int,
    concept: Concept | None = None,
    routed: Sequence[Concept] = (),
    bare: Together | None = None,
) -> Together:
    """Pictures of both, of each alone and of the bare classes, with the same seeds whoever draws.

    A route leaves pictures of the bare class to the base model, to the bit: `bare` gives theirs.
    """
    taught = concept is not None or bool(routed)

    def look(prompts: Sequence[str]) -> Seen:
        return lab.recognizer.look(lab.draw(prompts, concept, seed, None, routed))

    def seen_alone(one: Subject) -> Seen:
        return look(evaluation_prompts([one], lab.pictures_per_prompt, taught)[0])

    prompts, facts = evaluation_prompts(pair, lab.pictures_per_prompt, taught)
    seen = look(prompts)
    looks = [one.look for one in pair]
    both = both_present(seen, looks).float()
    first, second = (one.words if taught else one.look.shape for one in pair)
    in_order = torch.tensor([p.index(first) < p.index(second) for p in prompts])
    alone = [image_alignment(seen_alone(one), one.look).mean() for one in pair]
    if bare is None:
        drift, class_alignment = lab.class_drift(pair, concept, seed, routed=routed)
    else:
        drift, class_alignment = bare.drift, bare.class_alignment
    return Together(
        alone=float(torch.stack(alone).mean()),
        both_present=float(both.mean()),
        first_first=float(both[in_order].mean()),
        second_first=float(both[~in_order].mean()),
        bleed=float(bleeds(seen, looks).float().mean()),
        text_alignment=float(text_alignment(seen, facts).mean()),
        class_alignment=class_alignment,
        drift=drift,
    )


def main() -> None:
    recipes = argparse.ArgumentParser(add_help=False)
    recipes.add_argument("--every-word", action="store_true", help="the recipe of version 0.1")
    given = options(__doc__, concept_seed=400, seeds=3, more=[recipes])
    rows = run_command(given, every_word if given.every_word else own_words, Together)
    print(markdown_table(_TITLE, [(name, scores) for _, name, scores in rows], _COLUMNS))


if __name__ == "__main__":
    main()
