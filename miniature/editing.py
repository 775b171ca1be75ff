"""What Edit Concepts does to pictures of the miniature.

`python -m custom_diffusion.miniature.editing` erases, replaces and moderates each shape, and
debiases its colour, and lets the judge look at prompts with the word and with other shapes.
docs/editing.md has the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..concept.concept import Concept
from ..formats.base import BaseModel
from ..host.diffusers.sampling import applied_concept
from ..merge.edit_report import EditReport
from ..merge.editing import edit_concept
from ..merge.edits import Edit
from .cells import markdown_table, options, run_command
from .judge import Facts, named_color, text_alignment
from .laboratory import Laboratory
from .recognizer import Seen
from .world import SHAPES, world_captions

_TEMPLATES = (
    "photo of a {}",
    "a {} on snow",
    "picture of a {} at night",
    "photo of a red {}",
    "photo of a {} on the left",
    "a {} in fog",
)
_WANTED = {"red": 0.5, "blue": 0.5}
_ROUNDS, _DEBIASED = 3, 16


@dataclass(frozen=True)
class EditScore:
    """Means over the pictures of one model; shares of pictures, or 0 to 1."""

    present: float
    """Probability that the edited word's shape is in pictures of its prompts"""
    other: float
    """The same of the shape that it is replaced by, the next one"""
    neighbours: float
    """Text alignment of prompts of the three other shapes"""
    moved: float
    """How far keys and values of the other shapes moved, the mean"""
    restored: float = 1.0
    """Whether the weights were the base's bit for bit, once the edit was taken off"""


@dataclass(frozen=True)
class ColorScore:
    """Shares of pictures whose shape has the colour, by name."""

    red: float
    blue: float
    others: float
    present: float


def run_cell(number: int, seed: int) -> list[tuple[str, str, EditScore]]:
    """Every edit of one shape; pictures of one seed."""
    lab = Laboratory()
    word = SHAPES[number % len(SHAPES)]
    other = SHAPES[(number + 1) % len(SHAPES)]
    rest = [shape for shape in SHAPES if shape != word]
    kept = ("small", "very small", "far away", "on snow", "at night", "in fog")
    plans: dict[str, tuple[Edit, Sequence[str], float]] = {
        "erased": (Edit(word), (), 0.0),
        "erased, softness 0.01": (Edit(word), (), 0.01),
        "erased, other shapes preserved": (Edit(word), (*rest, *kept), 0.0),
        "moderated by half": (Edit(word, share=0.5), (), 0.0),
        "replaced by another shape": (Edit(word, other), (), 0.0),
    }
    rows = [("edits", "the model as it is", _score(lab, word, other, None, None, seed))]
    for name, (edit, preserved, softness) in plans.items():
        concept, report = edited(lab, [edit], preserved, softness)
        rows.append(("edits", name, _score(lab, word, other, concept, report, seed)))
    return rows


def edited(
    lab: Laboratory,
    edits: Sequence[Edit],
    preserved: Sequence[str] = (),
    softness: float = 0.0,
) -> tuple[Concept, EditReport]:
    return edit_concept(
        BaseModel.of(lab.pipeline.unet.named_parameters()).weights,
        lab.encoder,
        edits,
        preserved=preserved,
        softness=softness,
        captions=world_captions(),
    )


def _score(
    lab: Laboratory,
    word: str,
    other: str,
    concept: Concept | None,
    report: EditReport | None,
    seed: int,
) -> EditScore:
    before = [p.detach().clone() for p in lab.pipeline.unet.parameters()]
    seen = _look(lab, [template.format(word) for template in _TEMPLATES], concept, seed)
    rest = [shape for shape in SHAPES if shape != word]
    prompts = [template.format(shape) for template in _TEMPLATES[:2] for shape in rest]
    beside = _look(lab, prompts, concept, seed)
    with applied_concept(lab.pipeline, concept):
        pass
    same = all(map(torch.equal, before, lab.pipeline.unet.parameters()))
    moves = dict((*report.preserved, *report.neighbours)) if report else {}
    return EditScore(
        present=float(seen.presence[:, SHAPES.index(word)].mean()),
        other=float(seen.presence[:, SHAPES.index(other)].mean()),
        neighbours=float(text_alignment(beside, [Facts.of(p) for p in prompts]).mean()),
        moved=sum(moves.get(shape, 0.0) for shape in rest) / len(rest),
        restored=float(same),
    )


def run_debias(number: int, seed: int) -> list[tuple[str, str, ColorScore]]:
    """UCE's loop: the amounts grow by the share that is wanted less the share that is drawn."""
    lab = Laboratory()
    word = SHAPES[number % len(SHAPES)]
    concept, amounts = None, dict.fromkeys(_WANTED, 0.0)
    rows: list[tuple[str, str, ColorScore]] = []
    for step in range(_ROUNDS + 1):
        seen = _look(lab, [f"photo of a {word}"] * _DEBIASED, concept, seed)
        score = _colors(seen, SHAPES.index(word))
        rows.append(("colours", f"after {step} rounds" if step else "the model as it is", score))
        for name, wanted in _WANTED.items():
            amounts[name] += wanted - getattr(score, name)
        concept, _ = edited(lab, [Edit(word, attributes=tuple(amounts.items()))])
    return rows


def _colors(seen: Seen, shape: int) -> ColorScore:
    names = [named_color(color) for color in seen.color[:, shape]]
    red, blue = (names.count(name) / len(names) for name in ("red", "blue"))
    return ColorScore(red, blue, 1 - red - blue, float(seen.presence[:, shape].mean()))


def _look(lab: Laboratory, prompts: Sequence[str], concept: Concept | None, seed: int) -> Seen:
    drawn: Tensor = lab.draw(prompts, concept, seed)
    return lab.recognizer.look(drawn)


def main() -> None:
    given = options(__doc__, concept_seed=0, seeds=1)
    given.concepts = len(SHAPES)
    rows = run_command(given, run_cell, EditScore)
    columns = {
        "word's shape drawn": ("present", 2),
        "next shape drawn": ("other", 2),
        "other shapes' text alignment": ("neighbours", 2),
        "other shapes moved": ("moved", 2),
        "restored to the bit": ("restored", 0),
    }
    print(markdown_table("edit", [(name, score) for _, name, score in rows], columns))
    given.json = given.json and given.json.with_suffix(".colours.json")
    colors = run_command(given, run_debias, ColorScore)
    columns = {name: (name, 2) for name in ("red", "blue", "others", "present")}
    print(markdown_table("colours", [(name, score) for _, name, score in colors], columns))


if __name__ == "__main__":
    main()
