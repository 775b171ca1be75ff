"""The training methods side by side: `python -m custom_diffusion.miniature.methods`.

Each teaches the same concepts with the same pictures, steps and regularization; those that change
the whole UNet at a tenth of the rate, as they are published. docs/fidelity.md has the table.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from ..trainer.methods import METHODS
from .benchmark import ALL_WEIGHTS_RATE, COLUMNS
from .cells import Row, markdown_table, options, run_command
from .laboratory import Laboratory, Score, pair_of_subjects
from .model import EVERY_WORD

RANK = 4
"""Of the low-rank method: the miniature's matrices have 64 to 128 rows."""
_TITLE = "method"


def run_cell(number: int, seed: int) -> list[Row[Score]]:
    """Every method on the first concept of pair `number`, with one training seed."""
    lab = _laboratory()
    one, _ = pair_of_subjects(number, seed)
    rows: list[Row[Score]] = []
    for name, method in METHODS.items():
        rate = EVERY_WORD.learning_rate * (ALL_WEIGHTS_RATE if method.whole_network else 1)
        config = replace(EVERY_WORD, method=name, rank=RANK, learning_rate=rate, seed=seed)
        pipeline = None
        if method.whole_network:
            pipeline, concept = lab.teach_whole_network(one, config)
        else:
            concept = lab.teach([one], config)
        rows.append((_TITLE, name, lab.score([one], concept, seed, pipeline)))
    return rows


@cache
def _laboratory() -> Laboratory:
    return Laboratory()


def main() -> None:
    rows = run_command(options(__doc__, concept_seed=0, seeds=1), run_cell, Score)
    print(markdown_table(_TITLE, [(name, score) for _, name, score in rows], COLUMNS))


if __name__ == "__main__":
    main()
