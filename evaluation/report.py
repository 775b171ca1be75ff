"""An evaluation for people: a verdict, a table, a plot and a sheet; and for programs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..pictures.opening import read_picture
from ..pictures.plot import COLOURS, Axis, Series, line_plot
from ..pictures.sheet import Row, lay_out
from .alignment import CropScores
from .scores import Evaluation, Score, cropped, standard_error
from .trials import BASE, Plan, Trial

_COLUMNS = 8
_GREY = "#888888"
_NAME = 24
"""Characters of a name in a table or a legend"""


def verdict(found: Evaluation) -> list[str]:
    """A sentence or two of the best strength, then what was not measured."""
    best = found.best()
    sentences = [_follows(found, best), *(_looks(found, best, name) for name in best.image)]
    sentences += _subjects(found, best)
    if best.drift and found.base.drift:
        sentences.append(
            f"The bare class: KID {best.drift.kid:.1f}, of the base model "
            f"{found.base.drift.kid:.1f} (less is nearer to real pictures)."
        )
    return [f"Strength {best.strength:g}. {' '.join(filter(None, sentences))}"]


def _follows(found: Evaluation, score: Score) -> str:
    as_before = found.follows_as_before(score)
    if as_before is None or score.text is None or found.base.text is None:
        return ""
    how = "as before" if as_before else "less well than before"
    figures = f"{score.text.mean():.3f}, base model {found.base.text.mean():.3f}"
    return f"Follows prompts {how} (text alignment {figures})."


def _looks(found: Evaluation, score: Score, name: str) -> str:
    looks, values = found.looks_like(score, name), score.image[name]
    if looks is not None:
        return f"Looks like your {name} in {looks} of {len(values)} pictures."
    nearer = int((values > found.base.image[name]).sum())
    return f"Nearer to your {name} than the base model's in {nearer} of {len(values)} pictures."


def _subjects(found: Evaluation, score: Score) -> Iterator[str]:
    """Of several in one picture, each by itself: whose it looks most like, and whose it takes."""
    names = found.plan.subjects
    if score.crops is None:
        return
    for place, name in enumerate(names):
        presence, bleed = float(score.crops.presence[place]), score.crops.bleed[place]
        if math.isnan(presence):
            yield f"No prompt names {name}."
            continue
        others = {other: float(bleed[i]) for i, other in enumerate(names) if i != place}
        taken = ", ".join(f"{value:+.3f} from {other}" for other, value in others.items())
        yield f"By itself {name} is nearest to your {name} in {presence:.0%} (bleed {taken})."


def table(found: Evaluation) -> list[tuple[str, ...]]:
    """A row a strength, below a head; means with their standard errors."""
    names = [name[:_NAME] for name in found.references]
    several = len(names) > 1
    head = ["strength"]
    if found.base.text is not None:
        head.append("text alignment")
    for name in names:
        ending = f" to {name}" if several else ""
        head += [f"image alignment{ending}", f"looks like {name if several else 'it'}"]
    for name in found.plan.subjects:
        head += [f"{name[:_NAME]} is itself", f"bleeds into {name[:_NAME]}"]
    if found.base.drift:
        head += ["class KID x1000", "class FID x1000"]
    return [tuple(head), *(tuple(_cells(found, score)) for score in found.scores)]


def _cells(found: Evaluation, score: Score) -> list[str]:
    cells = ["base model" if score.strength == BASE else f"{score.strength:g}"]
    if score.text is not None:
        cells.append(_mean(score.text))
    for name, values in score.image.items():
        looks = found.looks_like(score, name)
        cells += [_mean(values), "" if looks is None else f"{looks} of {len(values)}"]
    for place in range(len(found.plan.subjects)):
        cells += ["", ""] if score.crops is None else _crop_cells(score.crops, place)
    if score.drift:
        cells += [f"{score.drift.kid:.2f}", f"{score.drift.fid:.2f}"]
    return cells


def _crop_cells(crops: CropScores, place: int) -> list[str]:
    """How often a subject is itself, and the most that another's looks are in it."""
    presence = float(crops.presence[place])
    if math.isnan(presence):
        return ["", ""]
    others = [i for i in range(len(crops.bleed)) if i != place]
    return [f"{presence:.0%}", f"{float(crops.bleed[place, others].max()):+.3f}"]


def _mean(values: Tensor) -> str:
    return f"{values.mean():.3f} ± {standard_error(values):.3f}"


def as_json(found: Evaluation) -> dict[str, Any]:
    """All of it, each picture's scores too, as plain JSON values."""
    return {
        "verdict": verdict(found),
        "remarks": list(found.remarks),
        "judge": found.judge,
        "references": dict(found.references),
        "references_alike": {n: own if own == own else None for n, own in found.own.items()},
        "strengths": [_score_json(found, score) for score in found.scores],
    }


def _score_json(found: Evaluation, score: Score) -> dict[str, Any]:
    trials = found.plan.trials(score.strength)
    pictures = [
        {
            "prompt": trial.prompt,
            "seed": trial.seed,
            "text_alignment": None if score.text is None else float(score.text[number]),
            "image_alignment": {n: float(values[number]) for n, values in score.image.items()},
        }
        for number, trial in enumerate(trials)
    ]
    return {
        "strength": score.strength,
        "text_alignment": None if score.text is None else float(score.text.mean()),
        "image_alignment": {n: float(values.mean()) for n, values in score.image.items()},
        "looks_like": {name: found.looks_like(score, name) for name in score.image},
        "subjects": _crops_json(found.plan.subjects, score.crops),
        "class_kid_x1000": score.drift and score.drift.kid,
        "class_fid_x1000": score.drift and score.drift.fid,
        "pictures": pictures,
    }


def _crops_json(names: Sequence[str], crops: CropScores | None) -> dict[str, Any] | None:
    if crops is None:
        return None
    return {
        name: {
            "presence": _number(crops.presence[place]),
            "resemblance": _number(crops.resemblance[place]),
            "bleed": {
                other: _number(crops.bleed[place, i]) for i, other in enumerate(names) if i != place
            },
        }
        for place, name in enumerate(names)
    }


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)


def alignment_plot(found: Evaluation) -> Image.Image:
    """Text against image alignment, as in the paper's Fig. 8, a mark a strength; over the strength
    where no text was read.
    """
    x = Axis("strength" if found.base.text is None else "text alignment")
    several = len(found.references) > 1
    series: list[Series] = []
    for name in found.references:
        for score in found.scores:
            point = (
                score.strength if score.text is None else float(score.text.mean()),
                float(score.image[name].mean()),
            )
            title = "base model" if score.strength == BASE else f"strength {score.strength:g}"
            colour = _GREY if score.strength == BASE else COLOURS[(len(series) - 1) % len(COLOURS)]
            title = f"{title}, {name[:_NAME]}" if several else title
            series.append(Series(title, [point], colour, marks=[point]))
    return line_plot("Text and image alignment", x, Axis("image alignment"), series)


def sheet(
    plan: Plan,
    folder: Path,
    references: Sequence[Image.Image],
    found: Evaluation | None = None,
    tile: int = 160,
) -> Image.Image:
    """References, then what the base model and each strength draw of the first prompts, with scores
    where there are some.
    """
    words = {score.strength: _words(score) for score in found.scores} if found else {}
    rows = [Row("Your pictures", "", [image.convert("RGB") for image in references[:_COLUMNS]])]
    for strength in (BASE, *plan.strengths):
        trials = _first(plan.trials(strength), len(plan.seeds))
        title = "Base model" if strength == BASE else f"Strength {strength:g}"
        pictures = [read_picture(trial.path(folder)) for trial in trials]
        captions = [trial.prompt for trial in trials]
        rows.append(Row(title, words.get(strength, ""), pictures, captions))
        for name in plan.subjects:
            shown = [trial for trial in trials if name in dict(trial.subjects)]
            crops = [
                cropped(picture, trial.boxes(folder)[name])
                for picture, trial in zip(pictures, trials, strict=True)
                if trial in shown
            ]
            rows.append(Row(name[:_NAME], "where the prompt's\nword looks", crops))
    return lay_out([row for row in rows if row.images], tile, label=190)


def _words(score: Score) -> str:
    text = [] if score.text is None else [f"text {score.text.mean():.3f}"]
    return "\n".join([*text, *(f"image {v.mean():.3f}" for v in score.image.values())])


def _first(trials: Sequence[Trial], seeds: int) -> Sequence[Trial]:
    """One of each prompt; where prompts are fewer than columns, more seeds of them."""
    prompts = len(trials) // seeds
    each = min(seeds, max(1, _COLUMNS // prompts))
    return [trials[p * seeds + s] for p in range(prompts) for s in range(each)][:_COLUMNS]
