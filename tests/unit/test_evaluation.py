"""An evaluation without a host: its pictures are shades, and the judge reads shades."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.errors import ConfigError, DataError
from custom_diffusion.evaluation.features import Judge, picture_features
from custom_diffusion.evaluation.prompts import (
    PROMPTS,
    check_prompts,
    concept_prompt,
    plain_prompt,
    read_prompts,
    unweighted,
)
from custom_diffusion.evaluation.report import alignment_plot, as_json, sheet, table, verdict
from custom_diffusion.evaluation.scores import Evaluation, Score, measure
from custom_diffusion.evaluation.trials import (
    BASE,
    Drawn,
    Plan,
    Trial,
    concept_fingerprint,
    draw_trials,
)
from PIL import Image
from support.concepts import random_concept
from torch import Tensor

CAT = random_concept()
SETTINGS = {"model": "abc"}
COLOURS = {"cat": 200, "dog": 40}


class Painter:
    """The base model draws grey; the concept is red, more so the stronger it is."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.drawn: list[Trial] = []
        self._stop_after = stop_after

    def __call__(self, trials: Sequence[Trial]) -> Drawn:
        if len(self.drawn) >= self._stop_after:
            raise KeyboardInterrupt
        assert len({(trial.prompt, trial.strength) for trial in trials}) == 1
        self.drawn += trials
        return Drawn(torch.stack([self._picture(trial) for trial in trials]))

    def _picture(self, trial: Trial) -> Tensor:
        green = 0.5 - 0.4 * min(trial.strength, 1)
        return torch.tensor([0.5 + 0.01 * trial.seed, green, 0.5]).expand(8, 8, 3)


def red(count: int = 3) -> list[Image.Image]:
    return [Image.new("RGB", (9 + n, 8), (140, 5 + n, 120)) for n in range(count)]


def colour_judge(reads: bool = True) -> Judge:
    """Features are the mean colour; every text is a grey one."""

    def see(images_bhwc: Tensor) -> Tensor:
        return images_bhwc.mean((1, 2)) - torch.tensor([0.0, 0.3, 0.0])

    def read(texts: Sequence[str]) -> Tensor:
        return torch.tensor([[0.5, 0.2, 0.5]]).expand(len(texts), 3)

    return Judge("colours", see, read if reads else None)


def plan(**changes: Any) -> Plan:
    settings: dict[str, Any] = {"prompts": PROMPTS[:3], "seeds": (0, 1), "strengths": (0.5, 1.0)}
    return Plan(CAT, **{**settings, **changes})


def evaluated(
    folder: Path, chosen: Plan | None = None, judge: Judge | None = None, **more: Any
) -> Evaluation:
    chosen = chosen or plan()
    draw_trials(folder, SETTINGS, chosen.everything(), Painter())
    more = {"references": {"<new1> cat": red()}, **more}
    return measure(chosen, folder, judge or colour_judge(), **more)


def test_prompts_name_the_concept_and_are_compared_without_it() -> None:
    assert len(set(PROMPTS)) == 20 and all(prompt.count("{}") == 1 for prompt in PROMPTS)
    for prompt, drawn, compared in [
        ("photo of a {} at sea", "photo of a <new1> cat at sea", "photo of a cat at sea"),
        ("a <new1> cat, asleep", "a <new1> cat, asleep", "a cat, asleep"),
        ("<new1> on a mat", "<new1> on a mat", "cat on a mat"),
        ("a (<new1> cat:1.2) here", "a (<new1> cat:1.2) here", "a cat here"),
        ("a dog", "a dog", "a dog"),
    ]:
        assert concept_prompt(prompt, CAT) == drawn
        assert unweighted(plain_prompt(prompt, CAT)) == compared
    (warning,) = check_prompts(["a {}", "a <new1>", "a dog"], CAT)
    assert warning.startswith("1 of 3 prompts do not name the concept, 'a dog'")
    dog = random_concept("<new2>", "dog", seed=1)
    both = replace(CAT, tokens=CAT.tokens + dog.tokens)
    assert concept_prompt("a {}", both) == "a <new1> cat and a <new2> dog"
    assert plain_prompt("a {}", both) == "a cat and a dog"


def test_concepts_without_words_say_what_to_do() -> None:
    taught = random_concept(None, constraint_prompts=("moongate",))
    assert concept_prompt("a {}", taught) == plain_prompt("a {}", taught) == "a moongate"
    foreign = random_concept(class_noun="")
    assert concept_prompt("a {}", foreign) == "a <new1>"
    with pytest.raises(ConfigError, match="Set class_noun in Load Concept"):
        plain_prompt("a {}", foreign)


def test_prompts_are_read_a_line_each() -> None:
    assert read_prompts(" a {} \n\n a {}\nb {}\n") == ("a {}", "b {}")
    assert read_prompts("\n") == PROMPTS
    with pytest.raises(ConfigError, match="at most 1000"):
        read_prompts("\n".join(map(str, range(1001))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strengths": (0.0, 1.0)}, "Leave out 0"),
        ({"strengths": ()}, "Of strengths"),
        ({"strengths": (math.nan,)}, "Give finite numbers"),
        ({"seeds": (1, 1)}, "each once"),
    ],
)
def test_a_plan_says_what_it_cannot_draw(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**changes)


def test_an_interrupted_evaluation_goes_on_and_more_seeds_draw_only_what_is_new(
    tmp_path: Path,
) -> None:
    first, second, third = Painter(stop_after=5), Painter(), Painter()
    with pytest.raises(KeyboardInterrupt):
        draw_trials(tmp_path, SETTINGS, plan().everything(), first, batch_size=1)
    draw_trials(tmp_path, SETTINGS, plan().everything(), second)
    assert sorted(map(repr, first.drawn + second.drawn)) == sorted(map(repr, plan().everything()))
    done: list[tuple[int, int]] = []
    more = plan(seeds=(0, 1, 2), strengths=(1.0, 0.5, 0.25)).everything()
    draw_trials(tmp_path, SETTINGS, more, third, on_progress=lambda *counts: done.append(counts))
    assert set(third.drawn) == set(more) - set(plan().everything())
    assert done[0] == (18, 36) and done[-1] == (36, 36)
    with pytest.raises(DataError, match="made with other settings"):
        draw_trials(tmp_path, {"model": "other"}, more, third)


def test_pictures_of_the_base_model_have_no_word_of_the_concept() -> None:
    everything = plan(class_count=2).everything()
    assert len(everything) == len(set(everything)) == 3 * 6 + 3 * 2 - 2  # "photo of a cat" is one
    assert {t.strength for t in everything if "<new1>" not in t.prompt} >= {BASE}
    assert not [t for t in everything if t.strength == BASE and "<new1>" in t.prompt]


def test_scores_are_means_of_cosines_over_all_pairs(tmp_path: Path) -> None:
    found = evaluated(tmp_path)
    judge, references = colour_judge(), red()
    cosine = torch.nn.functional.cosine_similarity
    for score, strength in zip(found.scores, (BASE, 0.5, 1.0), strict=True):
        for number, trial in enumerate(plan().trials(strength)):
            seen = picture_features(judge, [Image.open(trial.path(tmp_path))])
            known = torch.cat([picture_features(judge, [one]) for one in references])
            assert score.image["<new1> cat"][number].item() == pytest.approx(
                float(cosine(seen, known).mean()), abs=1e-5
            )
            assert score.text is not None
            text = torch.tensor([[0.5, 0.2, 0.5]])
            wanted = 2.5 * max(0.0, float(cosine(seen, text)))
            assert score.text[number].item() == pytest.approx(wanted, abs=1e-5)


def test_the_verdict_is_plain(tmp_path: Path) -> None:
    found = evaluated(tmp_path)
    likes = [found.looks_like(score, "<new1> cat") for score in found.scores]
    assert likes[0] == 0 and likes[-1] == 6
    best = found.best()
    (line,) = verdict(found)
    assert line.startswith(f"Strength {best.strength:g}. Follows prompts")
    assert "Looks like your <new1> cat in 6 of 6 pictures." in line
    head, *rows = table(found)
    assert head == ("strength", "text alignment", "image alignment", "looks like it")
    assert [row[0] for row in rows] == ["base model", "0.5", "1"]
    assert all(len(row) == len(head) for row in rows)
    saved = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert [len(one["pictures"]) for one in saved["strengths"]] == [6, 6, 6]
    assert saved["strengths"][0]["pictures"][0]["prompt"] == "photo of a cat"


def scored(text: float, image: float, strength: float = 1.0) -> Score:
    return Score(strength, {"cat": torch.tensor([image, image])}, torch.tensor([text, text]))


def test_the_best_strength_follows_prompts_where_any_does() -> None:
    base = scored(0.80, 0.5, BASE)
    scores = (base, scored(0.79, 0.7, 0.5), scored(0.78, 0.8, 0.8), scored(0.6, 0.9, 1.0))
    found = Evaluation(plan(), "judge", {"cat": 2}, {"cat": 0.9}, scores)
    assert found.best().strength == 0.8
    assert "as before" in verdict(found)[0]
    worse = replace(found, scores=(base, scored(0.5, 0.7, 0.5), scored(0.6, 0.9, 1.0)))
    assert worse.best().strength == 1.0
    assert "less well than before (text alignment 0.600, base model 0.800)" in verdict(worse)[0]


def test_a_judge_that_reads_nothing_says_nothing_of_prompts(tmp_path: Path) -> None:
    found = evaluated(tmp_path, judge=colour_judge(reads=False))
    assert "prompts" not in verdict(found)[0]
    assert table(found)[0] == ("strength", "image alignment", "looks like it")
    assert alignment_plot(found).width > 0


def test_plot_and_sheet_show_every_strength(tmp_path: Path) -> None:
    found = evaluated(tmp_path)
    assert alignment_plot(found).size == (1360, 800)
    whole, without = (sheet(plan(), tmp_path, red(), one) for one in (found, None))
    assert whole.size == without.size and whole.tobytes() != without.tobytes()
    many = sheet(plan(seeds=tuple(range(2))), tmp_path, red(20))
    assert many.width == 190 + 8 * 166  # no more columns


def test_one_reference_and_one_class_picture_are_said_and_nothing_is_made_up(
    tmp_path: Path,
) -> None:
    found = evaluated(
        tmp_path,
        plan(class_count=4),
        references={"<new1> cat": red(1)},
        class_pictures=red(1),
    )
    assert len(found.remarks) == 2
    assert "one picture of <new1> cat" in found.remarks[0] and "no KID" in found.remarks[1]
    assert found.base.drift is None and math.isnan(found.threshold("<new1> cat"))
    assert "Nearer to your <new1> cat than the base model's in 6 of 6 pictures" in verdict(found)[0]
    json.dumps(as_json(found), allow_nan=False)


def test_the_drift_of_the_class_is_measured_against_real_pictures(tmp_path: Path) -> None:
    real = [Image.new("RGB", (8, 8), (128 + n, 127, 127)) for n in range(10)]
    found = evaluated(tmp_path, plan(class_count=8), class_pictures=real)
    base, _, strong = (score.drift for score in found.scores)
    assert base and strong and strong.kid > 10 * abs(base.kid) and strong.fid > 10 * base.fid
    assert table(found)[0][-2:] == ("class KID x1000", "class FID x1000")
    assert "The bare class: KID" in verdict(found)[0]


@pytest.mark.parametrize("references", [{}, {"<new1> cat": []}])
def test_no_reference_is_refused(tmp_path: Path, references: dict[str, list[Image.Image]]) -> None:
    with pytest.raises(DataError, match="There are no reference pictures"):
        evaluated(tmp_path, references=references)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_features_that_are_no_numbers_are_named(tmp_path: Path, value: float) -> None:
    broken = Judge("a broken CLIP", lambda images: torch.full((len(images), 4), value))
    with pytest.raises(DataError, match="a broken CLIP makes features of pictures 1 and following"):
        evaluated(tmp_path, judge=broken)


def test_ten_thousand_pictures_are_looked_at_a_batch_at_a_time() -> None:
    alive = 0

    def pictures() -> Iterator[Image.Image]:
        for number in range(10_000):
            yield Image.new("RGB", (64, 48), (number % 250, 9, 9))

    def see(images_bhwc: Tensor) -> Tensor:
        nonlocal alive
        alive = max(alive, len(images_bhwc))
        return images_bhwc.mean((1, 2))

    tracemalloc.start()
    features = picture_features(Judge("colours", see), pictures())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert features.shape == (10_000, 3) and alive == 16
    assert peak < 20e6


def test_large_photographs_come_alone_and_reduced() -> None:
    sizes: list[tuple[int, ...]] = []

    def see(images_bhwc: Tensor) -> Tensor:
        sizes.append(tuple(images_bhwc.shape[:3]))
        return images_bhwc.mean((1, 2))

    photographs = [Image.new("RGB", (6000, 4000), "red")] * 3
    picture_features(Judge("colours", see), photographs)
    assert sizes == [(1, 1334, 2000)] * 3 or sizes == [(2, 1334, 2000), (1, 1334, 2000)]


def test_a_fingerprint_follows_all_that_a_concept_changes() -> None:
    assert concept_fingerprint(random_concept()) == concept_fingerprint(CAT)
    others = [random_concept(seed=1), random_concept("<new2>"), random_concept(rank=2)]
    assert len({concept_fingerprint(one) for one in [CAT, *others]}) == 4
