"""Several subjects in one picture: found by where their words look, and compared one by one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.attention.boxes import boxes_of, subject_boxes
from custom_diffusion.concept.errors import ConfigError, DataError
from custom_diffusion.evaluation.features import Judge
from custom_diffusion.evaluation.prompts import Together, names_of
from custom_diffusion.evaluation.report import as_json, sheet, table, verdict
from custom_diffusion.evaluation.scores import Evaluation, cropped, measure
from custom_diffusion.evaluation.trials import BASE, Drawn, Plan, Trial, draw_trials
from custom_diffusion.host.diffusers.attention import watched_words, watching
from custom_diffusion.host.diffusers.lending import text_encoder
from custom_diffusion.host.diffusers.sampling import sample
from custom_diffusion.miniature.laboratory import Laboratory
from custom_diffusion.miniature.model import GUIDANCE, PICTURE_EDGE, SAMPLING_STEPS
from custom_diffusion.miniature.world import SHAPES
from PIL import Image
from support.concepts import random_concept
from torch import Tensor

CAT, DOG = random_concept(), random_concept("<new2>", "dog", seed=1)
NAMES = ("<new1> cat", "<new2> dog")
LOOKS = {"<new1> cat": (0.9, 0.2, 0.2), "<new2> dog": (0.2, 0.9, 0.2)}
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def plan(*prompts: str, **changes: Any) -> Plan:
    settings: dict[str, Any] = {"seeds": (0, 1), "subjects": NAMES, **changes}
    return Plan(Together((CAT, DOG)), prompts or ("a {}", "a {} at sea"), **settings)


class Painter:
    """The cat left and the dog right; with `mixed` the dog has the cat's colour in odd seeds."""

    def __init__(self, mixed: bool = False) -> None:
        self.mixed = mixed
        self.drawn: list[Trial] = []

    def __call__(self, trials: Sequence[Trial]) -> Drawn:
        self.drawn += trials
        images = torch.stack([self._picture(trial) for trial in trials])
        place = dict(zip(NAMES, (LEFT, RIGHT), strict=True))
        return Drawn(images, [{n: place[n] for n, _ in trial.subjects} for trial in trials])

    def _picture(self, trial: Trial) -> Tensor:
        cat, dog = (torch.tensor(LOOKS[name]) for name in NAMES)
        dog = cat if self.mixed and trial.seed % 2 else dog
        return torch.stack([cat, dog])[None].repeat_interleave(8, 0).repeat_interleave(4, 1)


def references() -> dict[str, list[Image.Image]]:
    colours = {name: tuple(round(255 * one) for one in look) for name, look in LOOKS.items()}
    return {name: [Image.new("RGB", (8, 8 + n), colours[name]) for n in (0, 1)] for name in NAMES}


def colour_judge() -> Judge:
    return Judge("colours", lambda images: images.mean((1, 2)))


def evaluated(folder: Path, chosen: Plan, painter: Painter) -> Evaluation:
    draw_trials(folder, {}, chosen.everything(), painter)
    return measure(chosen, folder, colour_judge(), references())


def test_each_subject_is_compared_with_its_own_and_the_other(tmp_path: Path) -> None:
    right = evaluated(tmp_path / "right", plan(), Painter())
    wrong = evaluated(tmp_path / "wrong", plan(), Painter(mixed=True))
    assert right.base.crops is None
    crops = right.best().crops
    assert crops is not None
    assert crops.presence.tolist() == [1, 1]
    assert crops.resemblance.tolist() == pytest.approx([1, 1], abs=1e-4)
    assert crops.bleed.abs().max() < 1e-4
    mixed = wrong.best().crops
    assert mixed is not None
    cat, dog = (torch.tensor(LOOKS[name]) for name in NAMES)
    apart = float(torch.nn.functional.cosine_similarity(cat, dog, 0))
    assert mixed.presence.tolist() == [1, 0.5]
    assert float(mixed.resemblance[1]) == pytest.approx((1 + apart) / 2, abs=1e-3)
    assert float(mixed.bleed[1, 0]) == pytest.approx((1 + apart) / 2 - apart, abs=1e-3)
    assert abs(float(mixed.bleed[0, 1])) < 1e-3
    (line,) = verdict(wrong)
    assert "By itself <new2> dog is nearest to your <new2> dog in 50% (bleed +" in line
    head, base, taught = table(wrong)
    assert head[-4:-1] == ("<new1> cat is itself", "bleeds into <new1> cat", "<new2> dog is itself")
    assert base[-4:] == ("", "", "", "") and taught[-2] == "50%"
    saved = json.loads(json.dumps(as_json(wrong), allow_nan=False))
    assert saved["strengths"][0]["subjects"] is None
    assert saved["strengths"][1]["subjects"]["<new2> dog"]["presence"] == 0.5


def test_the_worst_off_subject_chooses_the_strength(tmp_path: Path) -> None:
    class Stronger(Painter):
        def _picture(self, trial: Trial) -> Tensor:
            self.mixed = trial.strength > 0.6
            return super()._picture(trial)

    found = evaluated(tmp_path, plan(strengths=(0.5, 1.0)), Stronger())
    assert found.best().strength == 0.5


def test_a_prompt_without_a_subject_counts_for_the_other_alone(tmp_path: Path) -> None:
    chosen = plan("a <new1> cat", "<new1> and a <new2> dog")
    subjects = [trial.subjects for trial in chosen.trials(1.0)]
    assert subjects[0] == (("<new1> cat", "<new1> cat"),)
    assert subjects[2] == (("<new1> cat", "<new1>"), ("<new2> dog", "<new2> dog"))
    assert not any(trial.subjects for trial in chosen.trials(BASE))
    found = evaluated(tmp_path, chosen, Painter())
    crops = found.best().crops
    assert crops is not None and crops.presence.tolist() == [1, 1]
    nobody = plan("a <new1> cat")
    only = evaluated(tmp_path, nobody, Painter())
    assert "No prompt names <new2> dog." in verdict(only)[0]
    json.dumps(as_json(only), allow_nan=False)
    assert len(table(only)[2]) == len(table(only)[0])


def test_pictures_from_before_subjects_were_looked_for_are_drawn_again(tmp_path: Path) -> None:
    without = plan(subjects=())
    draw_trials(tmp_path, {}, without.everything(), Painter())
    again, nothing = Painter(), Painter()
    draw_trials(tmp_path, {}, plan().everything(), again)
    assert again.drawn == plan().trials(1.0)
    draw_trials(tmp_path, {}, plan().everything(), nothing)
    assert not nothing.drawn
    assert sheet(plan(), tmp_path, []).height > sheet(without, tmp_path, []).height
    spoilt = plan().trials(1.0)[0].boxes_path(tmp_path)
    for content in ("{}", "[]", '{"<new1> cat": [0, 0, 2, 1]}', '{"<new1> cat": 5}', "\xff"):
        spoilt.write_text(content)
        with pytest.raises(DataError, match="Delete it, and evaluate again"):
            measure(plan(), tmp_path, colour_judge(), references())


def test_two_concepts_of_one_word_cannot_be_told_apart() -> None:
    assert names_of(Together((CAT, DOG))) == list(NAMES)
    with pytest.raises(ConfigError, match="Two of the concepts have the trigger word <new1>"):
        Together((CAT, replace(DOG, tokens=CAT.tokens)))


def test_a_box_is_around_the_hottest_part_with_a_margin() -> None:
    maps = torch.rand(3, 20, 40, generator=torch.Generator().manual_seed(0)) * 0.1
    maps[0, 4:12, 5:17] = 1.0
    maps[0, 15, 30] = 1.0  # a spot elsewhere
    maps[1, 10:20, 30:40] = 0.5  # its own range counts, not another's
    maps[2] = maps[1] * 0.9 + 0.05
    maps[2, 10:20, 30:40] = 0.2
    maps[2, 0:3, 36:40] = 0.5
    first, second, third = subject_boxes(maps)
    assert first == pytest.approx((3.8 / 40, 3.2 / 20, 18.2 / 40, 12.8 / 20))
    assert second == pytest.approx((28 / 40, 8 / 20, 1, 1), abs=0.06)
    left, top, right, bottom = third
    assert (top, right) == (0, 1) and left == pytest.approx(0.75) and bottom == pytest.approx(0.25)
    (alone,) = boxes_of(maps[None], ["a", "b", "c"])
    assert list(alone.values()) == [first, second, third]
    assert cropped(Image.new("RGB", (80, 40)), (0.5, 0.25, 1, 1)).size == (40, 30)


def test_boxes_are_where_the_miniature_has_drawn_what_its_words_say() -> None:
    """Judged by a network that sees the picture and knows nothing of attention."""
    laboratory = Laboratory()
    names = ["triangle", "circle"]
    prompt = "a red triangle and a blue circle"
    words = watched_words(text_encoder(laboratory.pipeline), prompt, names)
    with watching(laboratory.pipeline, words) as recorder:
        images = sample(
            laboratory.pipeline,
            [prompt] * 6,
            resolution=PICTURE_EDGE,
            steps=SAMPLING_STEPS,
            guidance=GUIDANCE,
        )
    found = boxes_of(recorder.maps().between(), names)
    seen = laboratory.recognizer.look(images.permute(0, 3, 1, 2))
    inside = 0
    for number, boxes in enumerate(found):
        for name, (left, top, right, bottom) in boxes.items():
            x, y = seen.place[number, SHAPES.index(name)].tolist()
            inside += left <= x <= right and top <= y <= bottom
    every = [box for boxes in found for box in boxes.values()]
    chance = sum((box[2] - box[0]) * (box[3] - box[1]) for box in every)
    assert inside >= 10 and chance < 7, (inside, chance)
