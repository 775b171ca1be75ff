"""Folders of jobs come from anybody: one that makes no sense is listed with its reason, and
disturbs no other.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from custom_diffusion.cli import main
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import ConfigError, CustomDiffusionError, JobError
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.trainer.events import Event, StepDone
from custom_diffusion.trainer.jobs.job import Job
from custom_diffusion.trainer.jobs.own_files import OwnFiles
from custom_diffusion.trainer.jobs.records import Description, MetricsLine, Outcome
from custom_diffusion.trainer.jobs.service import TrainingService
from custom_diffusion.trainer.jobs.snapshot import ENDED, JobState, Snapshot
from custom_diffusion.trainer.jobs.work import Work
from support.odd_jobs import (
    DEEP,
    GOOD,
    ODD,
    OLD_JOB,
    UNREADABLE,
    good_job,
    nameless_job,
    odd_job,
    old_job,
)

pytestmark = pytest.mark.any_version

LONG_S = 20.0


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """With two good ones that have other dates than what is between them in the alphabet."""
    good_job(tmp_path / "jobs" / "a", name="a", created=5.0, fingerprint="a")
    good_job(tmp_path / "jobs" / "z", name="z", created=4.0, fingerprint="z")
    return tmp_path / "jobs"


@pytest.fixture
def odd(jobs: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    yield odd_job(jobs, request.param)


def work(folder: Path) -> Work:
    def train(
        _: object, should_stop: Callable[[], bool], on_event: Callable[[Event], None]
    ) -> Concept:
        on_event(StepDone(1, 0.5))
        return Concept(FAMILIES["sd15"], {})

    def save(concept: Concept, own_files: OwnFiles) -> Path:
        (folder / "saved").touch()
        return folder / "saved"

    return Work(train, save)


def all_of(job: Job) -> Snapshot:
    """What the page, the command and the next training ask of a job."""
    snapshot = job.snapshot()
    json.dumps(snapshot.as_json(), allow_nan=False).encode()
    json.dumps(job.folder.description.content, allow_nan=False, ensure_ascii=False).encode()
    assert all(isinstance(loss, float) for loss in job.losses())
    job.folder.samples()
    job.folder.newest_checkpoint()
    job.folder.newest_step()
    job.folder.best_concept()
    return snapshot


@pytest.mark.timeout(30)
@pytest.mark.parametrize("odd", ODD, indirect=True)
def test_an_odd_job_is_listed_with_its_reason_and_disturbs_no_other(
    jobs: Path, odd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said, _ = ODD[odd.name.replace("-", " ")]
    service = TrainingService(jobs)
    by_name = {job.id: all_of(job) for job in service.jobs()}
    assert by_name.keys() == {"a", "z", odd.name}
    assert [name for name in by_name if name != odd.name] == ["z", "a"]
    assert by_name["a"] == Snapshot("a", "a", JobState.PAUSED, 0, 8)
    assert service.job(odd.name).folder.path == odd
    assert said in by_name[odd.name].error
    assert (by_name[odd.name].state is JobState.FAILED) == bool(said)
    found = service.find("a", 8)
    assert found is not None and found.id == "a"
    assert service.find("nothing", 8) is None
    assert main(["jobs", "list", str(jobs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*by_name]
    for verb in ("show", "losses"):
        assert main(["jobs", verb, str(jobs), odd.name]) == 0
    job = service.submit("a", 8, {}, work(jobs.parent), "a")
    assert job.id == "a" and job.wait(LONG_S)
    service.delete(odd.name)
    assert {job.id for job in service.jobs()} == {"a", "z"}
    assert sorted(path.name for path in jobs.iterdir()) == ["a", "z"]


@pytest.mark.timeout(60)
def test_all_odd_jobs_together(jobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {odd_job(jobs, kind).name: kind for kind in ODD}
    nameless_job(jobs)
    service = TrainingService(jobs)
    snapshots = {job.id: all_of(job) for job in service.jobs()}
    assert len(ODD) >= 80 and snapshots.keys() == {"a", "z", *kinds, "cat-\\xff\n"}
    for name, kind in kinds.items():
        assert ODD[kind][0] in snapshots[name].error
    assert main(["jobs", "list", str(jobs)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(snapshots)
    for name in ("a", "z"):
        assert service.submit(name, 8, {}, work(jobs.parent), name).wait(LONG_S)
    new = service.submit("new", 1, {}, work(jobs.parent), "new")
    assert new.wait(LONG_S) and new.snapshot().state is JobState.FINISHED
    for name in snapshots:
        service.delete(name)
    assert [job.id for job in service.jobs()] == [new.id]
    assert [path.name for path in jobs.iterdir()] == [new.id]


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "odd", [k for k, (said, _) in ODD.items() if said != UNREADABLE], indirect=True
)
def test_an_odd_job_that_is_asked_for_ends_by_itself(jobs: Path, odd: Path) -> None:
    """It trains, or says why it cannot; it never hangs, and no thread dies of it."""
    service = TrainingService(jobs)
    job = service.job(odd.name)
    try:
        job.queue(work(jobs.parent))
    except CustomDiffusionError:
        return
    service.resume(job.id)
    assert job.wait(LONG_S)
    assert job.snapshot().state in ENDED and (job.snapshot().error or job.snapshot().step)
    assert service.submit("next", 1, {}, work(jobs.parent)).wait(LONG_S)


def test_a_job_that_cannot_be_read_says_so_to_whoever_wants_it_to_go_on(jobs: Path) -> None:
    odd_job(jobs, "steps true")
    service = TrainingService(jobs)
    with pytest.raises(JobError, match=r"its steps is True; needed: a whole number"):
        service.resume("steps-true")
    with pytest.raises(JobError, match=r"is failed\."):
        service.pause("steps-true")
    service.stop("steps-true")  # it has ended


def test_a_file_that_is_put_right_is_read_again(jobs: Path) -> None:
    folder = odd_job(jobs, "steps true")
    service = TrainingService(jobs)
    assert service.job(folder.name).snapshot().state is JobState.FAILED
    (folder / "job.json").write_text(json.dumps(GOOD))
    assert service.job(folder.name).folder.description.steps == 8
    assert TrainingService(jobs).job(folder.name).snapshot().state is JobState.PAUSED


def test_a_job_of_the_version_before_opens_as_it_did(tmp_path: Path) -> None:
    folder = old_job(tmp_path / "jobs")
    (job,) = TrainingService(tmp_path / "jobs").jobs()
    note = (
        "memory ran out at step 3: from now on 1 of the pictures at once, with gradient "
        "checkpointing; slower, the same steps"
    )
    assert job.snapshot() == Snapshot(
        id=folder.name,
        name="Käse 猫",
        state=JobState.FINISHED,
        step=4,
        steps=4,
        notes=(note,),
        concept_file=Path("/home/me/ComfyUI/models/custom_diffusion/cat.safetensors"),
    )
    assert job.losses() == [1.0, 0.5, 1 / 3, 0.25]
    checkpoint, problems = job.folder.newest_checkpoint()
    assert problems == []
    assert checkpoint is not None and checkpoint.step == 4
    described = json.loads((OLD_JOB / "job.json").read_text(encoding="utf-8"))
    description = job.folder.description
    assert description.content == described
    assert description.graph == described["graph"] and description.fingerprint == "cat 0123"
    assert description.keep_best == 2 and description.created == described["created"]
    (folder / "outcome.json").unlink()
    paused = TrainingService(tmp_path / "jobs").job(folder.name).snapshot()
    assert (paused.state, paused.step) == (JobState.PAUSED, 4)


@pytest.mark.parametrize(
    "description",
    [
        {"config": {"rate": float("inf")}},
        {"graph": {"1": {"inputs": {"text": "\ud800"}}}},
        {"graph": json.loads("[" * 200 + "]" * 200)},
        {"graph": {"1": "x" * 40_000_000}},
        {"keep_best": -1},
    ],
    ids=["infinite", "half a pair", "deep", "large", "negative"],
)
def test_what_could_not_be_read_again_is_not_written(
    tmp_path: Path, description: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match=r"training job 'cat' cannot be kept .* Change the graph"):
        TrainingService(tmp_path / "jobs").submit("cat", 1, description, work(tmp_path))
    assert not (tmp_path / "jobs").exists()


def test_an_error_of_any_text_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File names that are no text end up in messages, and a traceback may be very long."""
    # pytest-xdist cannot send a captured log to its other process that is no text.
    monkeypatch.setattr(logging.getLogger("custom_diffusion"), "disabled", True)

    def train(*_: object) -> Concept:
        raise ValueError(f"no picture \udcff.png {'x' * 300_000}")

    service = TrainingService(tmp_path / "jobs")
    job = service.submit("cat", 1, {}, Work(train, lambda concept, own_files: tmp_path))
    assert job.wait(LONG_S)
    (seen,) = TrainingService(tmp_path / "jobs").jobs()
    assert seen.snapshot().state is JobState.FAILED
    assert seen.snapshot().error.endswith("xxx") and seen.snapshot().log


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_no_exception_ends_the_trainer_thread_or_leaves_a_job_running(
    tmp_path: Path, error: BaseException
) -> None:
    def train(*_: object) -> Concept:
        raise error

    service = TrainingService(tmp_path / "jobs")
    bad = service.submit("bad", 1, {}, Work(train, lambda concept, own_files: tmp_path))
    good = service.submit("good", 1, {}, work(tmp_path))
    assert bad.wait(LONG_S) and good.wait(LONG_S)
    assert bad.snapshot().state is JobState.FAILED and type(error).__name__ in bad.snapshot().log
    assert good.snapshot().state is JobState.FINISHED


@pytest.fixture
def deaths(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Threads that an exception has ended."""
    seen: list[Any] = []
    monkeypatch.setattr("threading.excepthook", seen.append)
    return seen


class Wordless(Exception):
    def __str__(self) -> str:
        raise MemoryError


def fail_with(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("where", ["train", "save", "turn", "is_busy", "lock"])
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("odd numbers"), "odd numbers"),
        (NotImplementedError("no locks here"), "no locks here"),
        (SystemExit("out"), "out"),
        (Wordless(), "Wordless"),
    ],
)
def test_whatever_a_job_raises_is_its_failure_and_the_same_thread_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    deaths: list[Any],
    where: str,
    error: BaseException,
    text: str,
) -> None:
    threads = []

    def train(_: object, should_stop: Callable[[], bool], on_event: Callable[[Any], None]) -> Any:
        threads.append(threading.current_thread())
        should_stop()
        on_event(StepDone(1, 0.5))
        return Concept(FAMILIES["sd15"], {})

    started = threading.Event()

    def wait_before(_: object) -> AbstractContextManager[bool]:
        assert started.wait(LONG_S)
        return nullcontext(True)

    service = TrainingService(tmp_path / "jobs")
    first = service.submit("first", 1, {}, Work(train, work(tmp_path).save, turn=wait_before))
    parts: dict[str, Any] = {"train": train, "save": work(tmp_path).save}
    if where != "lock":
        parts[where] = fail_with(error)
    bad = service.submit("bad", 1, {}, Work(**parts))
    if where == "lock":  # as on file systems that know none
        monkeypatch.setattr(bad.folder, "locked", fail_with(error))
    good = service.submit("good", 1, {}, Work(train, work(tmp_path).save))
    started.set()
    assert first.wait(LONG_S) and bad.wait(LONG_S) and good.wait(LONG_S)
    failed = bad.snapshot()
    assert (failed.state, failed.error) == (JobState.FAILED, text)
    assert type(error).__name__ in failed.log and "fail" in failed.log
    assert good.snapshot().state is JobState.FINISHED
    assert len(set(threads)) == 1 and deaths == []


def test_an_exception_of_whoever_looks_on_leaves_nobody_waiting(
    tmp_path: Path, deaths: list[Any]
) -> None:
    """SystemExit, which a listener may raise: others are only logged."""
    seen: list[JobState] = []

    def look_on(job: Job) -> None:
        seen.append(job.snapshot().state)
        if job.snapshot().name == "bad" and job.snapshot().state is not JobState.QUEUED:
            raise SystemExit

    service = TrainingService(tmp_path / "jobs", on_change=look_on)
    bad = service.submit("bad", 1, {}, work(tmp_path))
    good = service.submit("good", 1, {}, work(tmp_path))
    assert bad.wait(LONG_S) and good.wait(LONG_S)
    assert bad.snapshot().state is JobState.FAILED and "SystemExit" in bad.snapshot().log
    assert good.snapshot().state is JobState.FINISHED


def test_a_thread_that_cannot_be_started_is_started_with_the_next_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = TrainingService(tmp_path / "jobs")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail_with(RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError, match="can't start new thread"):
            service.submit("first", 1, {}, work(tmp_path))
    second = service.submit("second", 1, {}, work(tmp_path))
    (first,) = [job for job in service.jobs() if job is not second]
    assert first.wait(LONG_S) and second.wait(LONG_S)
    assert first.snapshot().state is second.snapshot().state is JobState.FINISHED


def test_what_is_written_is_what_is_read() -> None:
    outcome = Outcome("failed", 3, "/a/b", 'err\n"or', "log", ("ä", "猫"))
    assert Outcome.parse(outcome.as_json().encode()) == outcome
    line = MetricsLine(1, 0.1, time.time())
    assert MetricsLine.parse(line.as_json().encode()) == line
    with pytest.raises(ValueError, match="brackets are too deep"):
        Description.parse(DEEP.encode())


@pytest.mark.parametrize(
    "values", [{"step": 0}, {"loss": 1}, {"loss": float("nan")}, {"time": "x"}]
)
def test_a_record_checks_itself_however_it_is_made(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"its {next(iter(values))} is .*; needed"):
        MetricsLine(**{"step": 1, "loss": 0.5, "time": None, **values})  # type: ignore[arg-type]
