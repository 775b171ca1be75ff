"""The paper's tables in miniature: `python -m custom_diffusion.miniature.benchmark`.

Single concepts as in Table 3 and pairs as in Table 1 of the paper; docs/fidelity.md has the tables.
Concept n is the first of pair n; its partner is the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ..concept.concept import Concept
from ..merge.merging import merge_concepts
from .cells import markdown_table, options, run_command
from .laboratory import Laboratory, Score, added, pair_of_subjects
from .model import EVERY_WORD
from .world import world_captions

SINGLE, PAIR = "one concept", "two concepts"
# The whole UNet learns at a lower rate, as in the paper's ablation and in DreamBooth.
ALL_WEIGHTS_RATE = 0.1

Row = tuple[str, str, Score]
"""Table, method and score"""
COLUMNS = {
    "text alignment": ("text_alignment", 3),
    "image alignment": ("image_alignment", 3),
    "drift": ("drift", 0),
    "bare class": ("class_alignment", 3),
}
_PAIR_COLUMNS = {**COLUMNS, "both present": ("both_present", 2), "bleed": ("bleed", 2)}


def run_cell(number: int, seed: int) -> list[Row]:
    """All methods on concept `number` and its partner, with one training seed."""
    return list(_cell(Laboratory(), number, seed))


def _cell(lab: Laboratory, number: int, seed: int) -> Iterator[Row]:
    config = replace(EVERY_WORD, seed=seed)
    first, second = pair = pair_of_subjects(number, seed)
    bare = replace(first, training=replace(first.training, regularization=()))
    drawn = replace(
        first,
        training=replace(
            first.training, regularization=lab.generated_class(first.look.shape, seed)
        ),
    )
    yield SINGLE, "base model", lab.score([first], None, seed)
    concept = lab.teach([first], config)
    yield SINGLE, "Custom Diffusion", lab.score([first], concept, seed)
    for method, subject, settings in (
        ("with augmentation", first, replace(config, augment=True)),
        ("without regularization", bare, config),
        ("generated regularization", drawn, config),
    ):
        yield SINGLE, method, lab.score([first], lab.teach([subject], settings), seed)
    slow = ALL_WEIGHTS_RATE * config.learning_rate
    tuned, words = lab.teach_whole_network(
        first, replace(config, method="fine-tune all", learning_rate=slow)
    )
    yield SINGLE, "all weights", lab.score([first], words, seed, tuned)

    partner = lab.teach([second], config)
    merged, _ = merge_concepts([concept, partner], lab.encoder, captions=world_captions())
    twice = replace(config, steps=2 * config.steps)
    yield PAIR, "base model", lab.score(pair, None, seed)
    pairs: dict[str, Callable[[], Concept]] = {
        "joint training": lambda: lab.teach(pair, twice),
        "merged (Eq. 5)": lambda: merged,
        "deltas added": lambda: added([concept, partner]),
        "one after the other": lambda: lab.teach([second], config, after=concept),
    }
    for method, both in pairs.items():
        yield PAIR, method, lab.score(pair, both(), seed)


def main() -> None:
    rows = run_command(options(__doc__, concept_seed=0, seeds=3), run_cell, Score)
    for kind, columns in ((SINGLE, COLUMNS), (PAIR, _PAIR_COLUMNS)):
        part = [(method, score) for name, method, score in rows if name == kind]
        print(f"{markdown_table(kind, part, columns)}\n")


if __name__ == "__main__":
    main()
