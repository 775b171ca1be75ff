"""The sheet of a job's steps in its folder, and the best of the kept ones by validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import JobError, UnknownJobError
from custom_diffusion.concept.file import read_concept
from custom_diffusion.trainer.jobs.comparison import Comparison
from custom_diffusion.trainer.jobs.folder import JobFolder
from custom_diffusion.trainer.jobs.records import ComparisonPlan, MetricsLine
from PIL import Image
from support.made_concepts import made_concept

LAYER = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
PLAN = ComparisonPlan("a <new1> cat", (2, 4), (0.5, 1.0), (7, 8))


def learnt(seed: int = 0) -> Concept:
    return made_concept({LAYER: (24, 768)}, seed=seed)


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    return JobFolder.create(tmp_path / "jobs", "cat", {"steps": 6, "keep_best": 2})


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (shade, 0, 0))


def drawn(folder: JobFolder, count: int = 8) -> Comparison:
    comparison = Comparison.begin(folder, PLAN)
    for seed, step in enumerate(PLAN.steps):
        comparison.write_concept(learnt(seed=seed), step)
    for number in range(count):
        comparison.write_picture(number, picture(number))
    return comparison


def test_a_sheet_is_found_again_as_far_as_it_is_drawn(folder: JobFolder) -> None:
    assert Comparison.newest(folder) is None
    drawn(folder, count=5)
    found = Comparison.newest(JobFolder(folder.path))
    assert found and found.plan == PLAN and list(found.pictures()) == [0, 1, 2, 3, 4]
    assert [PLAN.step_of(number) for number in range(8)] == [2, 2, 2, 2, 4, 4, 4, 4]
    before = {path.name for path in (folder.path / "comparisons").iterdir()}
    again = Comparison.begin(folder, ComparisonPlan("a cat", (2,), (1.0,), (0,)))
    assert again.pictures() == {} and len(before) == 1
    newest = Comparison.newest(folder)
    assert newest and newest.plan.prompt == "a cat"
    assert before.isdisjoint(path.name for path in (folder.path / "comparisons").iterdir())


def test_a_step_is_taken_though_the_run_has_dropped_it(folder: JobFolder, tmp_path: Path) -> None:
    comparison = drawn(folder)
    own = tmp_path / "concepts"
    files = [comparison.take(5, own, "my cat") for _ in range(2)]
    assert [file.name for file in files] == ["my-cat.safetensors", "my-cat-2.safetensors"]
    wanted, taken = learnt(seed=1).deltas, read_concept(files[1]).deltas
    for layer, delta in wanted.items():
        assert (taken[layer].dense() - delta.dense()).abs().max() < 1e-2
    assert Image.open(own / "my-cat-2.preview.png").getpixel((0, 0)) == (5, 0, 0)
    with pytest.raises(UnknownJobError, match="no picture 8: it is of 8"):
        comparison.take(8, own, "my cat")
    assert len(list(own.iterdir())) == 4


def test_a_job_that_is_deleted_meanwhile_is_named_and_not_made_again(folder: JobFolder) -> None:
    comparison = drawn(folder, count=3)
    folder.delete()
    for act in (
        lambda: comparison.write_picture(3, picture(3)),
        lambda: comparison.write_concept(learnt(), 4),
        lambda: comparison.concept(2),
        lambda: Comparison.begin(folder, PLAN),
    ):
        with pytest.raises(JobError, match=f"{folder.id} was deleted while its steps"):
            act()
    assert not folder.path.exists() and Comparison.newest(folder) is None


def test_a_job_that_is_deleted_while_a_picture_is_written_leaves_nothing(
    folder: JobFolder,
) -> None:
    comparison = drawn(folder, count=3)

    class Deleting(Image.Image):
        def save(self, *given: Any, **_: Any) -> None:
            file = Path(given[0])
            folder.delete()
            file.parent.mkdir(parents=True)
            file.write_bytes(b"a picture")

    with pytest.raises(JobError, match="was deleted while its steps"):
        comparison.write_picture(3, Deleting())
    assert not folder.path.exists()


@pytest.mark.parametrize(
    "values",
    [
        *({"steps": value} for value in ([], [0], ["2"], [True], 2, None, [2.0])),
        *({"strengths": value} for value in ([], ["1"], [None], [1e300])),
        *({"seeds": value} for value in ([], [2**64], list(range(101)))),
        *({"prompt": value} for value in (None, 1, "a" * 100_001)),
    ],
)
def test_a_plan_that_makes_no_sense_is_no_sheet(folder: JobFolder, values: dict[str, Any]) -> None:
    drawn(folder)
    (file,) = folder.path.glob("comparisons/*/plan.json")
    file.write_text(json.dumps({**PLAN.as_json(), **values}))
    assert Comparison.newest(folder) is None
    file.write_text(json.dumps(PLAN.as_json()))
    assert Comparison.newest(folder)
    file.write_bytes(b"\xff[")
    assert Comparison.newest(folder) is None


# The best of the kept steps


def test_the_best_are_those_of_the_lowest_validation_loss(folder: JobFolder) -> None:
    """Where nothing is measured at a step itself, by what was measured last."""
    losses = [9.0, 1.0, 5.0, 2.0, 1.0, 1.0]
    measured = {1: 0.5, 3: 0.1, 5: 0.3}
    with folder.metrics.after([]):
        for step, loss in enumerate(losses, start=1):
            folder.metrics.add(step, loss, measured.get(step))
            folder.write_concept(learnt(), step)
    assert list(folder.concepts()) == [3, 4, 6]
    best = folder.best_concept()
    assert best is not None and int(best.stem) == 3
    assert folder.validation() == measured and folder.losses() == losses


def test_lines_that_are_made_again_have_what_was_measured(folder: JobFolder) -> None:
    measured = {2: 0.25, 3: 0.5}
    with folder.metrics.after([1.0, 2.0, 3.0], measured):
        folder.metrics.add(4, 4.0, 0.125)
    assert folder.validation() == {**measured, 4: 0.125}
    first, second, *_ = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first) == {"step": 1, "loss": 1.0, "time": None}
    assert json.loads(second)["validation"] == 0.25


@pytest.mark.parametrize("value", ['"0.5"', "NaN", "1e300", "1", "true", "[]"])
def test_a_line_with_a_measurement_that_is_none_ends_the_log(value: str) -> None:
    line = f'{{"step": 1, "loss": 0.5, "time": null, "validation": {value}}}'
    with pytest.raises(ValueError, match="its validation is"):
        MetricsLine.parse(line.encode())
