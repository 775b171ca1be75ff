"""Scores of drawn pictures: how well they follow their prompts, look like the concept, and what has
become of the bare class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..concept.errors import DataError
from ..pictures.opening import read_picture
from .alignment import (
    CropScores,
    crop_scores,
    image_alignment,
    self_alignment,
    text_alignment,
)
from .distances import Moments, frechet_distance, kernel_distance
from .features import Judge, picture_features, text_features
from .prompts import plain_prompt, unweighted
from .trials import BASE, Box, Plan, Trial

AS_BEFORE = 0.95
"""Share of the base model's text alignment from which on prompts are called followed as before. In
the paper Textual Inversion has 84 % of Custom Diffusion's, DreamBooth 98 %.
"""


@dataclass(frozen=True)
class ClassDrift:
    """Of pictures of the bare class to real ones of it."""

    kid: float
    """1000 times the KID of features of length √d, whose kernel is (cos + 1)³ for any d"""
    fid: float
    """1000 times the FID of features of length 1"""


@dataclass(frozen=True)
class Score:
    """Of the pictures of one strength, in the order of `Plan.trials`."""

    strength: float
    image: Mapping[str, Tensor]
    """What is compared with → image alignment (n,)"""
    text: Tensor | None = None
    """Text alignment (n,); None where the judge reads no text"""
    drift: ClassDrift | None = None
    crops: CropScores | None = None
    """Of each subject by itself, in the order of `Plan.subjects`; None where none were looked for,
    and of the base model"""


@dataclass(frozen=True)
class Evaluation:
    """What came out."""

    plan: Plan
    judge: str
    references: Mapping[str, int]
    """What is compared with → how many pictures of it"""
    own: Mapping[str, float]
    """What is compared with → how much its pictures are alike; NaN of a single one"""
    scores: tuple[Score, ...]
    """The base model's first"""
    remarks: tuple[str, ...] = ()

    @property
    def base(self) -> Score:
        return self.scores[0]

    def threshold(self, name: str) -> float:
        """Image alignment from which on a picture looks like the concept: half way from the base
        model's pictures to the user's own. NaN where one picture, or unlike ones, say nothing.
        """
        low, high = float(self.base.image[name].mean()), self.own[name]
        return (low + high) / 2 if high > low else math.nan

    def looks_like(self, score: Score, name: str) -> int | None:
        """How many pictures do; None where nothing can be said."""
        threshold = self.threshold(name)
        found = int((score.image[name] > threshold).sum())
        return None if math.isnan(threshold) else found

    def follows_as_before(self, score: Score) -> bool | None:
        """Whether prompts are followed as the base model follows them; None without text."""
        if score.text is None or self.base.text is None:
            return None
        return float(score.text.mean()) >= AS_BEFORE * float(self.base.text.mean())

    def best(self) -> Score:
        """The strength that looks most like the concept, of those that follow prompts as before,
        if any does. Of several subjects the one that is worst off counts: first in how many of its
        crops it is itself, then how much they look like it.
        """
        taught = self.scores[1:]
        faithful = [score for score in taught if self.follows_as_before(score) is not False]
        return max(faithful or taught, key=_likeness)


def _likeness(score: Score) -> tuple[float, float]:
    if score.crops is None:
        return 0.0, min(float(values.mean()) for values in score.image.values())
    presence, resemblance = score.crops.presence, score.crops.resemblance
    return float(presence.nan_to_num().min()), float(resemblance.nan_to_num().min())


def standard_error(values: Tensor) -> float:
    """Of the mean of values (n,); 0 of a single one."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0


def measure(
    plan: Plan,
    folder: Path,
    judge: Judge,
    references: Mapping[str, Iterable[Image.Image]],
    class_pictures: Iterable[Image.Image] = (),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    reference_crops: Mapping[str, Iterable[Image.Image]] | None = None,
) -> Evaluation:
    """Scores the pictures that `draw_trials` left in `folder`. Pictures are opened one batch at a
    time, so that their number does not matter; `references` are the user's, by what they show.
    With subjects in the plan crops of each are compared with all: with `reference_crops`, or with
    the references where there are none.

    Raises DataError where there is no reference, or features are not finite.
    """
    shots = plan.everything()
    total, done = len(shots) + sum(len(trial.subjects) for trial in shots), 0

    def one_more() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    known = {name: picture_features(judge, pictures) for name, pictures in references.items()}
    if not known or not all(len(features) for features in known.values()):
        raise DataError(
            "There are no reference pictures, so nothing can be said about likeness. Give pictures "
            "of the concept; best some that it was not trained on."
        )
    real = picture_features(judge, class_pictures)
    texts = [unweighted(plain_prompt(prompt, plan.concept)) for prompt in plan.prompts]
    wanted = text_features(judge, texts, next(iter(known.values())).shape[1])

    def look(trials: Sequence[Trial]) -> Tensor:
        pictures = (read_picture(trial.path(folder)) for trial in trials)
        return picture_features(judge, pictures, one_more)

    alone = known
    if plan.subjects and reference_crops:
        alone = {name: picture_features(judge, seen) for name, seen in reference_crops.items()}

    def look_closer(trials: Sequence[Trial]) -> CropScores | None:
        if not any(trial.subjects for trial in trials):
            return None
        crops = [
            picture_features(judge, _crops(trials, name, folder), one_more)
            for name in plan.subjects
        ]
        width = max(one.shape[1] for one in crops)
        crops = [one if len(one) else one.new_zeros(0, width) for one in crops]
        return crop_scores(crops, [alone[name] for name in plan.subjects])

    scores = []
    for strength in (BASE, *plan.strengths):
        seen = look(plan.trials(strength))
        repeated = None if wanted is None else wanted.repeat_interleave(len(plan.seeds), 0)
        scores.append(
            Score(
                strength,
                {name: image_alignment(seen, features) for name, features in known.items()},
                None if repeated is None else text_alignment(seen, repeated),
                class_drift(look(plan.class_trials(strength)), real),
                look_closer(plan.trials(strength)),
            )
        )
    own = {name: float(self_alignment(features).mean()) for name, features in known.items()}
    counts = {name: len(features) for name, features in known.items()}
    remarks = (*judge.remarks, *_remarks(counts, len(real)))
    return Evaluation(plan, judge.name, counts, own, tuple(scores), remarks)


def _crops(trials: Sequence[Trial], name: str, folder: Path) -> Iterator[Image.Image]:
    """Of each picture that shows the subject, where it is."""
    for trial in trials:
        if name not in dict(trial.subjects):
            continue
        box = trial.boxes(folder).get(name)
        if box is None:
            raise DataError(
                f"{trial.boxes_path(folder)} does not say where {name} is. Delete it, and evaluate "
                f"again: the picture is drawn anew."
            )
        yield cropped(read_picture(trial.path(folder)), box)


def cropped(picture: Image.Image, box: Box) -> Image.Image:
    """A part of a picture, in shares of its edges."""
    edges = (picture.width, picture.height, picture.width, picture.height)
    left, top, right, bottom = (share * edge for share, edge in zip(box, edges, strict=True))
    return picture.crop((int(left), int(top), math.ceil(right), math.ceil(bottom)))


def class_drift(drawn: Tensor, real: Tensor) -> ClassDrift | None:
    """Of features (n, d) of length 1; None where there are not two pictures on either side."""
    if min(len(drawn), len(real)) < 2:
        return None
    scale = math.sqrt(drawn.shape[1])
    fid = frechet_distance(Moments.of([drawn]), Moments.of([real]))
    return ClassDrift(1000 * kernel_distance(drawn * scale, real * scale), 1000 * fid)


def _remarks(references: Mapping[str, int], real: int) -> list[str]:
    found = [
        f"There is one picture of {name}: it cannot be said from which likeness on a picture shows "
        f"it. Give two or more."
        for name, count in references.items()
        if count == 1
    ]
    if real == 1:
        found.append("One picture of the class has no spread: no KID. Give two or more, best 50.")
    return found
