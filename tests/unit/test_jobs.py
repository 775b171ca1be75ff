"""Jobs: their states, what they leave on disk, and what other threads see of them."""

from __future__ import annotations

import gc
import json
import logging
import operator
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import ConceptFileError, JobError, TrainingError
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.concept.naming import safe_file_name
from custom_diffusion.trainer.checkpoint import Checkpoint
from custom_diffusion.trainer.events import Event, PreviewBegun, PreviewDrawn, StepDone
from custom_diffusion.trainer.jobs.job import Job
from custom_diffusion.trainer.jobs.own_files import OwnFiles
from custom_diffusion.trainer.jobs.service import TrainingService
from custom_diffusion.trainer.jobs.snapshot import JobState, Snapshot
from custom_diffusion.trainer.jobs.work import Save, Work

CONCEPT = Concept(FAMILIES["sd15"], {})
LONG_S = 20.0

ShouldStop = Callable[[], bool]
OnEvent = Callable[[Event], None]
Training = Callable[[Checkpoint | None, ShouldStop, OnEvent], Concept]


class ScriptedTraining:
    """A training that does what the test allows it: every step waits for `allow`."""

    def __init__(self, steps: int = 3) -> None:
        self.steps = steps
        self.started, self.thread_name = threading.Event(), ""
        self._allowed, self._reached = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(
        self, checkpoint: Checkpoint | None, should_stop: ShouldStop, on_event: OnEvent
    ) -> Concept:
        self.thread_name = threading.current_thread().name
        self.started.set()
        for step in range(1, self.steps + 1):
            assert self._allowed.acquire(timeout=LONG_S)
            if should_stop():
                break
            on_event(StepDone(step, 1 / step))
            self._reached.release()
        return CONCEPT

    def allow(self, steps: int, wait: bool = True) -> None:
        for _ in range(steps):
            self._allowed.release()
        for _ in range(steps if wait else 0):
            assert self._reached.acquire(timeout=LONG_S)


def instant(steps: int = 1) -> Training:
    def train(_: Checkpoint | None, should_stop: ShouldStop, on_event: OnEvent) -> Concept:
        for step in range(1, steps + 1):
            on_event(StepDone(step, 0.5))
        return CONCEPT

    return train


def failing(error: Exception) -> Training:
    def train(_: Checkpoint | None, should_stop: ShouldStop, on_event: OnEvent) -> Concept:
        raise error

    return train


@pytest.fixture
def service(tmp_path: Path) -> TrainingService:
    return TrainingService(tmp_path / "jobs")


@pytest.fixture
def saved() -> list[Concept]:
    """What was saved, in order."""
    return []


@pytest.fixture
def save(tmp_path: Path, saved: list[Concept]) -> Save:
    def write(concept: Concept, own_files: OwnFiles) -> Path:
        saved.append(concept)
        path = tmp_path / f"saved-{len(saved)}"
        path.touch()
        return path

    return write


@pytest.fixture
def busy(service: TrainingService, save: Save) -> Iterator[tuple[Job, ScriptedTraining]]:
    """A job that keeps the trainer thread occupied until the test lets it go."""
    training = ScriptedTraining(steps=1)
    job = service.submit("busy", 1, {}, Work(training, save))
    assert training.started.wait(LONG_S)
    yield job, training
    training.allow(1, wait=False)
    assert job.wait(LONG_S)


def test_a_job_is_queued_prepared_run_and_finished(
    service: TrainingService,
    busy: tuple[Job, ScriptedTraining],
    save: Save,
    saved: list[Concept],
) -> None:
    busy_job, busy_training = busy
    training = ScriptedTraining(steps=3)
    job = service.submit("cat", 3, {}, Work(training, save))
    assert job.snapshot().state is JobState.QUEUED
    busy_training.allow(1)
    assert training.started.wait(LONG_S)
    assert job.snapshot().state is JobState.PREPARING
    training.allow(2)
    running = job.snapshot()
    assert (running.state, running.step, running.steps) == (JobState.RUNNING, 2, 3)
    assert job.losses() == [1.0, 0.5]
    assert job.losses(after_step=1) == [0.5]
    assert not running.ended
    training.allow(1, wait=False)
    assert job.wait(LONG_S)
    finished = job.snapshot()
    assert (finished.state, finished.step, finished.error) == (JobState.FINISHED, 3, "")
    assert job.losses() == [1.0, 0.5, 1 / 3]
    assert finished.concept_file is not None
    assert finished.concept_file.is_file()
    assert finished.ended
    assert busy_job.wait(LONG_S)
    assert len(saved) == 2


def test_stopping_in_the_middle_saves_what_was_learnt(
    service: TrainingService, save: Save, saved: list[Concept]
) -> None:
    training = ScriptedTraining(steps=10)
    job = service.submit("cat", 10, {}, Work(training, save))
    training.allow(4)
    service.stop(job.id)
    training.allow(1, wait=False)
    assert job.wait(LONG_S)
    stopped = job.snapshot()
    assert (stopped.state, stopped.step) == (JobState.STOPPED, 4)
    assert stopped.concept_file is not None
    assert saved == [CONCEPT]


def test_a_stop_that_comes_too_late_leaves_a_finished_job(
    service: TrainingService, save: Save
) -> None:
    stop_asked = threading.Event()

    def train(_: Checkpoint | None, should_stop: ShouldStop, on_event: OnEvent) -> Concept:
        on_event(StepDone(1, 0.5))
        assert stop_asked.wait(LONG_S)
        return CONCEPT

    job = service.submit("cat", 1, {}, Work(train, save))
    while job.snapshot().step == 0:
        pass
    service.stop(job.id)
    stop_asked.set()
    assert job.wait(LONG_S)
    assert job.snapshot().state is JobState.FINISHED


def test_a_queued_job_that_is_stopped_ends_at_once_and_never_trains(
    service: TrainingService,
    busy: tuple[Job, ScriptedTraining],
    save: Save,
    saved: list[Concept],
) -> None:
    training = ScriptedTraining(steps=1)
    job = service.submit("cat", 1, {}, Work(training, save))
    service.stop(job.id)
    assert job.wait(0)
    assert job.snapshot().state is JobState.STOPPED
    assert not busy[0].snapshot().ended
    busy[1].allow(1)
    after = service.submit("after", 1, {}, Work(instant(), save))
    assert after.wait(LONG_S)
    assert not training.started.is_set()
    stopped = job.snapshot()
    assert (stopped.state, stopped.step, stopped.concept_file) == (JobState.STOPPED, 0, None)
    assert len(saved) == 2  # the busy job's and the last one's


def test_stopping_before_the_first_step_saves_nothing(
    service: TrainingService, save: Save, saved: list[Concept]
) -> None:
    training = ScriptedTraining(steps=3)
    job = service.submit("cat", 3, {}, Work(training, save))
    assert training.started.wait(LONG_S)
    service.stop(job.id)
    training.allow(1, wait=False)
    assert job.wait(LONG_S)
    stopped = job.snapshot()
    assert stopped.state is JobState.STOPPED
    assert stopped.concept_file is None
    assert saved == []


def test_stopping_an_ended_job_changes_nothing(service: TrainingService, save: Save) -> None:
    job = service.submit("cat", 1, {}, Work(instant(), save))
    assert job.wait(LONG_S)
    before = job.snapshot()
    service.stop(job.id)
    assert job.snapshot() == before


@pytest.mark.parametrize(
    "error, message",
    [
        (TrainingError("The loss became nan at step 3."), "The loss became nan at step 3."),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_failure_is_told_logged_and_does_not_stop_the_next_job(
    service: TrainingService,
    save: Save,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    message: str,
) -> None:
    with caplog.at_level(logging.ERROR, "custom_diffusion"):
        job = service.submit("bad", 5, {}, Work(failing(error), save))
        following = service.submit("good", 1, {}, Work(instant(), save))
        assert following.wait(LONG_S)
    failed = job.snapshot()
    assert job.wait(0)
    assert (failed.state, failed.error) == (JobState.FAILED, message)
    assert failed.log.startswith("Traceback") and type(error).__name__ in failed.log
    assert failed.ended
    assert failed.concept_file is None
    assert following.snapshot().state is JobState.FINISHED
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert job.id in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_a_concept_that_cannot_be_saved_fails_with_the_reason(service: TrainingService) -> None:
    def save(concept: Concept, own_files: OwnFiles) -> Path:
        raise ConceptFileError("cat.safetensors could not be written: the disk is full.")

    job = service.submit("cat", 1, {}, Work(instant(), save))
    assert job.wait(LONG_S)
    failed = job.snapshot()
    assert failed.state is JobState.FAILED
    assert "the disk is full" in failed.error
    assert job.losses() == [0.5]


def test_jobs_run_one_by_one_in_order_on_the_trainer_thread(
    service: TrainingService, save: Save
) -> None:
    order: list[tuple[str, str]] = []

    def training(name: str) -> Training:
        def train(_: Checkpoint | None, should_stop: ShouldStop, on_event: OnEvent) -> Concept:
            order.append((name, threading.current_thread().name))
            return instant()(None, should_stop, on_event)

        return train

    jobs = [service.submit(name, 1, {}, Work(training(name), save)) for name in "abcdef"]
    assert all(job.wait(LONG_S) for job in jobs)
    assert order == [(name, "custom-diffusion-trainer") for name in "abcdef"]
    assert [job.snapshot().name for job in service.jobs()] == list("abcdef")


def test_the_trainer_thread_does_not_keep_the_program_alive(
    service: TrainingService, save: Save
) -> None:
    daemons: list[bool] = []

    def train(_: Checkpoint | None, should_stop: ShouldStop, on_event: OnEvent) -> Concept:
        daemons.append(threading.current_thread().daemon)
        return CONCEPT

    assert service.submit("cat", 1, {}, Work(train, save)).wait(LONG_S)
    assert daemons == [True]


@pytest.mark.slow
def test_snapshots_are_consistent_while_the_job_runs(service: TrainingService, save: Save) -> None:
    steps = 4000
    interval = sys.getswitchinterval()
    torn: list[Snapshot] = []
    reads = [0, 0]  # of each reader

    def wait_for_readers() -> None:
        """Otherwise the trainer thread could end before a reader had its turn."""
        before, until = list(reads), time.monotonic() + LONG_S
        while any(map(operator.eq, reads, before)) and time.monotonic() < until:
            time.sleep(0)

    def train(_: Checkpoint | None, should_stop: ShouldStop, on_event: OnEvent) -> Concept:
        for step in range(1, steps + 1):
            on_event(StepDone(step, float(step)))
            if step % 20 == 0:
                on_event(PreviewDrawn(step, torch.full((2, 2, 3), float(step))))
                wait_for_readers()
        return CONCEPT

    def is_torn(snapshot: Snapshot, later_losses: list[float]) -> bool:
        picture = snapshot.preview_hwc
        return (
            len(later_losses) < snapshot.step
            or later_losses != [float(n + 1) for n in range(len(later_losses))]
            or (picture is not None and float(picture[0, 0, 0]) != snapshot.preview_step)
            or (snapshot.state is JobState.FINISHED) != (snapshot.concept_file is not None)
        )

    job = service.submit("cat", steps, {}, Work(train, save))

    def read(reader: int) -> None:
        while not (snapshot := job.snapshot()).ended:
            reads[reader] += 1
            if is_torn(snapshot, job.losses()):
                torn.append(snapshot)
        reads[reader] += 1

    sys.setswitchinterval(1e-6)
    try:
        readers = [threading.Thread(target=read, args=(n,)) for n in range(len(reads))]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(LONG_S)
    finally:
        sys.setswitchinterval(interval)
    assert job.wait(LONG_S)
    assert min(reads) >= steps // 20
    assert torn == []
    assert job.losses() == [float(n) for n in range(1, steps + 1)]


def test_previews_are_in_the_snapshot(service: TrainingService, save: Save) -> None:
    picture = torch.rand(4, 4, 3)

    def train(_: Checkpoint | None, should_stop: ShouldStop, on_event: OnEvent) -> Concept:
        on_event(StepDone(1, 0.5))
        on_event(PreviewDrawn(1, picture))
        return CONCEPT

    job = service.submit("cat", 1, {}, Work(train, save))
    assert job.wait(LONG_S)
    snapshot = job.snapshot()
    assert snapshot.preview_hwc is picture
    assert snapshot.preview_step == 1


def test_snapshots_cannot_be_changed_and_stay_as_they_were(
    service: TrainingService, save: Save
) -> None:
    training = ScriptedTraining(steps=2)
    job = service.submit("cat", 2, {}, Work(training, save))
    training.allow(1)
    snapshot = job.snapshot()
    training.allow(1, wait=False)
    assert job.wait(LONG_S)
    assert (snapshot.state, snapshot.step) == (JobState.RUNNING, 1)
    with pytest.raises(AttributeError):
        snapshot.step = 7  # type: ignore[misc]


def test_an_ended_job_lets_go_of_its_models(service: TrainingService, save: Save) -> None:
    class Model:
        pass

    def submit() -> tuple[Job, weakref.ref[Model]]:
        model = Model()

        def train(_: Checkpoint | None, should_stop: ShouldStop, on_event: OnEvent) -> Concept:
            assert isinstance(model, Model)
            return instant()(None, should_stop, on_event)

        return service.submit("cat", 1, {}, Work(train, save)), weakref.ref(model)

    job, model = submit()
    assert job.wait(LONG_S)
    assert service.submit("after", 1, {}, Work(instant(), save)).wait(LONG_S)
    gc.collect()
    assert model() is None


def test_the_folder_of_a_job_holds_its_settings_and_one_line_a_step(
    service: TrainingService, save: Save, tmp_path: Path
) -> None:
    training = ScriptedTraining(steps=3)
    job = service.submit("Käse", 3, {"config": {"seed": 7}}, Work(training, save))
    assert job.folder.path.parent == tmp_path / "jobs"
    settings = json.loads((job.folder.path / "job.json").read_text(encoding="utf-8"))
    assert settings.pop("created") <= time.time()
    assert settings == {"name": "Käse", "steps": 3, "fingerprint": "", "config": {"seed": 7}}
    training.allow(2)  # the lines are there while the job runs
    lines = (job.folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [(line["step"], line["loss"]) for line in metrics] == [(1, 1.0), (2, 0.5)]
    assert metrics[0]["time"] <= metrics[1]["time"]
    training.allow(1, wait=False)
    assert job.wait(LONG_S)
    text = (job.folder.path / "metrics.jsonl").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 3


def test_jobs_of_one_name_have_folders_of_their_own(service: TrainingService, save: Save) -> None:
    jobs = [service.submit("cat", 1, {}, Work(instant(), save)) for _ in range(5)]
    assert all(job.wait(LONG_S) for job in jobs)
    assert len({job.folder.path for job in jobs}) == len({job.id for job in jobs}) == 5
    assert all((job.folder.path / "job.json").is_file() for job in jobs)
    assert all(service.job(job.id) is job for job in jobs)


@pytest.mark.parametrize("name", ["../../evil", "", "猫" * 120, "a/b\\c:d*e?", "x" * 500])
def test_job_folders_stay_inside_whatever_the_name(
    service: TrainingService, save: Save, tmp_path: Path, name: str
) -> None:
    job = service.submit(name, 1, {}, Work(instant(), save))
    assert job.wait(LONG_S)
    assert job.folder.path.parent == tmp_path / "jobs"
    assert job.snapshot().name == name


def test_an_unknown_job_is_answered_with_the_known_ones(
    service: TrainingService, save: Save
) -> None:
    with pytest.raises(JobError, match=r"no training job 'x'; known jobs: none"):
        service.job("x")
    job = service.submit("cat", 1, {}, Work(instant(), save))
    with pytest.raises(JobError, match=f"known jobs: {job.id}"):
        service.job("x")
    assert job.wait(LONG_S)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("my cat", "my-cat"),
        ("  cat_v1.2 ", "cat_v1.2"),
        ("../../etc/passwd", "etc-passwd"),
        ("..", "concept"),
        ("", "concept"),
        ("...hidden", "hidden"),
        ("a/b\\c:d", "a-b-c-d"),
        ("nul\0byte\n", "nul-byte"),
        ("<new1> cat", "new1--cat"),
        ("Käse 猫", "Käse-猫"),
    ],
)
def test_file_names_keep_what_is_harmless(name: str, expected: str) -> None:
    assert safe_file_name(name) == expected


@pytest.mark.parametrize("name", ["x" * 500, "猫" * 500, "𓀀" * 500])
def test_file_names_are_short_enough_for_every_file_system(name: str, tmp_path: Path) -> None:
    """255 bytes; a temporary name and a number must fit in as well."""
    safe = safe_file_name(name)
    assert len(safe) <= 100
    assert len(safe.encode()) <= 190
    assert safe[0] == safe_file_name(name)[0] == name[0]


def test_whoever_waits_for_a_job_can_be_let_go(
    service: TrainingService, busy: tuple[Job, ScriptedTraining]
) -> None:
    job, training = busy
    assert not job.snapshot().awaited
    with pytest.raises(JobError, match="No prompt waits"):
        service.release(job.id)
    with job.waiters.one_more() as one, job.waiters.one_more() as other:
        assert job.snapshot().as_json()["awaited"]
        service.release(job.id)
        assert one.is_set() and other.is_set()
        assert not job.snapshot().awaited
        with job.waiters.one_more() as later:
            assert job.snapshot().awaited and not later.is_set()
    assert not job.snapshot().awaited and service.released == 1
    assert not job.snapshot().ended  # it goes on


def test_a_job_says_what_it_is_busy_with_and_how_much_is_done(tmp_path: Path, save: Save) -> None:
    seen: list[tuple[str, float]] = []

    def look(job: Job) -> None:
        shown = job.snapshot().as_json()
        now = (shown["doing"], shown["progress"])
        if now not in seen[-1:]:
            seen.append(now)

    def train(_: Checkpoint | None, should_stop: ShouldStop, on_event: OnEvent) -> Concept:
        on_event(StepDone(1, 0.5))
        on_event(PreviewBegun(1))
        on_event(PreviewDrawn(1, torch.zeros(8, 8, 3)))
        on_event(StepDone(2, 0.5))
        return CONCEPT

    service = TrainingService(tmp_path / "jobs", look)
    assert service.submit("cat", 2, {}, Work(train, save)).wait(LONG_S)
    assert seen == [
        ("copying", pytest.approx(0.1)),
        ("starting", pytest.approx(0.1)),
        ("", pytest.approx(0.55)),
        ("drawing", pytest.approx(0.55)),
        ("", pytest.approx(0.55)),
        ("", pytest.approx(1)),
        ("saving", pytest.approx(1)),
        ("", pytest.approx(1)),
    ]
