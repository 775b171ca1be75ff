"""Which training and which constraint rows give merges that keep every concept and the class?

`python -m custom_diffusion.miniature.ablation` teaches pairs apart with each gradient cut, merges
each with several sets of rows, and has the results judged. The defaults of the pack come from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..concept.concept import Concept
from ..concept.prompts import subject
from ..merge.merging import merge_concepts
from ..trainer.config import GradientCut
from .cells import markdown_table, options, run_command
from .laboratory import Laboratory, Subject, added, pair_of_subjects
from .model import EVERY_WORD
from .world import world_captions

_TEMPLATES = (
    "{}",
    "a {}",
    "photo of a {}",
    "picture of a {}",
    "photo of a {} on snow",
    "photo of a {} at night",
    "a {} and a circle",
    "photo of a {} beside a square",
)
CUTS: tuple[GradientCut, ...] = ("none", "start", "start and padding")
ADDED = "deltas added"
ROWS: dict[str, dict[str, Any]] = {
    "V*, class, end": {},
    "and 8 templates": {"templates": _TEMPLATES},
    "ridge 1e-2": {"relative_ridge": 1e-2},
    ADDED: {},
}


@dataclass(frozen=True)
class Kept:
    """What a merge keeps: means over the pictures of one pair."""

    before: float
    """Image alignment of each concept's own model"""
    alone: float
    """Image alignment of each concept by itself in the merged model"""
    weaker: float
    """The same of the concept that suffers most"""
    both_present: float
    bleed: float
    class_alignment: float
    """Of the bare class: how much of a concept has leaked into it"""
    drift: float
    change: float
    """Norm of the merged change against the larger of the two concepts'"""


def run_cell(number: int, seed: int) -> list[tuple[str, str, Kept]]:
    """Every cut with every set of rows, on one pair with one training seed."""
    lab = Laboratory(pictures_per_prompt=2, class_pictures=16)
    pair = pair_of_subjects(number, seed)
    results = []
    for cut in CUTS:
        config = replace(EVERY_WORD, seed=seed, gradient_cut=cut)
        concepts = [lab.teach([one], config) for one in pair]
        before = _alone(lab, pair, concepts, seed)
        for name, variant in ROWS.items():
            if name == ADDED:
                merged, change = added(concepts), 1.0
            else:
                merged, change = _merged(lab, concepts, **variant)
            score = lab.score(pair, merged, seed)
            alone = _alone(lab, pair, [merged, merged], seed)
            assert score.both_present is not None and score.bleed is not None
            kept = Kept(
                before=sum(before) / 2,
                alone=sum(alone) / 2,
                weaker=min(alone),
                both_present=score.both_present,
                bleed=score.bleed,
                class_alignment=score.class_alignment,
                drift=score.drift,
                change=change,
            )
            results.append((f"cut: {cut}", name, kept))
    return results


def _alone(
    lab: Laboratory, pair: Sequence[Subject], concepts: Sequence[Concept], seed: int
) -> list[float]:
    return [lab.likeness(one, concept, seed) for one, concept in zip(pair, concepts, strict=True)]


def _merged(
    lab: Laboratory, concepts: Sequence[Concept], templates: Sequence[str] = (), **options: Any
) -> tuple[Concept, float]:
    if templates:
        concepts = [
            replace(
                concept,
                constraint_prompts=tuple(
                    template.format(subject(token.name, token.class_noun))
                    for token in concept.tokens
                    for template in templates
                ),
            )
            for concept in concepts
        ]
    merged, report = merge_concepts(concepts, lab.encoder, captions=world_captions(), **options)
    return merged, report.change


def main() -> None:
    rows = run_command(options(__doc__, concept_seed=100, seeds=1), run_cell, Kept)
    columns = {
        "each alone, before": ("before", 2),
        "each alone": ("alone", 2),
        "the weaker": ("weaker", 2),
        "both present": ("both_present", 2),
        "bleed": ("bleed", 2),
        "bare class": ("class_alignment", 2),
        "drift": ("drift", 0),
        "change": ("change", 1),
    }
    for cut in dict.fromkeys(cut for cut, _, _ in rows):
        part = [(name, kept) for c, name, kept in rows if c == cut]
        print(f"{markdown_table(cut, part, columns)}\n")


if __name__ == "__main__":
    main()
