"""What becomes of a job, wish by wish: every cell of the table, in every window of a turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import JobError
from custom_diffusion.trainer.checkpoint import Checkpoint
from custom_diffusion.trainer.events import CheckpointDue, StepDone
from custom_diffusion.trainer.jobs.folder import JobFolder
from custom_diffusion.trainer.jobs.job import Job
from custom_diffusion.trainer.jobs.own_files import OwnFiles
from custom_diffusion.trainer.jobs.service import TrainingService
from custom_diffusion.trainer.jobs.snapshot import JobState
from custom_diffusion.trainer.jobs.transitions import NEXT_STATE, STANDING, Wish
from custom_diffusion.trainer.jobs.work import Work
from support.concepts import random_concept

LONG_S = 30.0
STEPS = 4
BEFORE_THE_LOOP_IS_LEFT = ("turn", "loop")
AFTERWARDS = ("checkpoint", "left", "models go", "outcome", "unlocked")
GO_ON, PAUSE, STOP = Wish.GO_ON, Wish.PAUSE, Wish.STOP

# What a job comes to that was to do one thing and is to do another.
COMES_TO = {
    (PAUSE, GO_ON): JobState.FINISHED,
    (PAUSE, PAUSE): JobState.PAUSED,
    (PAUSE, STOP): JobState.STOPPED,
    (STOP, GO_ON): JobState.STOPPED,  # and that is said
    (STOP, PAUSE): JobState.STOPPED,
    (STOP, STOP): JobState.STOPPED,
}


class Staged:
    """A training of a few steps that halts in one window until it is let go on."""

    def __init__(self, folder: Path, window: str = "", early: Callable[[], None] = lambda: None):
        """`early` is called in the turn or after the first step, before the window is reached."""
        self._folder, self._window, self._early = folder, window, early
        self.arrived, self.go_on = threading.Event(), threading.Event()
        self.steps: list[int] = []
        self.saved: list[int] = []

    def reach(self, window: str) -> None:
        if window == self._window and not self.arrived.is_set():
            self.arrived.set()
            assert self.go_on.wait(LONG_S)

    def work(self) -> Work:
        return Work(self.train, self.save, turn=self.turn)

    @contextmanager
    def turn(self, should_leave: Callable[[], bool]) -> Iterator[bool]:
        if self._window == "turn" and not self.arrived.is_set():
            self._early()
        self.reach("turn")
        yield True
        self.reach("models go")

    def train(
        self,
        checkpoint: Checkpoint | None,
        should_stop: Callable[[], bool],
        on_event: Callable[[Any], None],
    ) -> Concept:
        losses = list(checkpoint.losses) if checkpoint else []
        while len(losses) < STEPS and not should_stop():
            losses.append(1.0)
            self.steps.append(len(losses))
            on_event(StepDone(len(losses), 1.0))
            if self.steps == [1] and self._window != "turn":
                self._early()
            self.reach("loop")
        self.reach("checkpoint")
        on_event(CheckpointDue(Checkpoint(tuple(losses), (torch.zeros(1),), ({},)), None))
        self.reach("left")
        return random_concept()

    def save(self, concept: Concept, own_files: OwnFiles) -> Path:
        self.saved.append(len(self.steps))
        path = self._folder / "cat.safetensors"
        path.touch()
        return path


@pytest.fixture
def service(tmp_path: Path) -> Iterator[TrainingService]:
    service = TrainingService(tmp_path / "jobs")
    yield service
    service.close(LONG_S)


def until_state(job: Job, state: JobState) -> None:
    end = time.monotonic() + LONG_S
    while job.snapshot().state is not state:
        assert time.monotonic() < end, f"it is {job.snapshot()}"
        time.sleep(0.002)


def wish_of(service: TrainingService, job_id: str, wish: Wish) -> None:
    {GO_ON: service.resume, PAUSE: service.pause, STOP: service.stop}[wish](job_id)


def halted(
    service: TrainingService,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    window: str,
    early: Wish | None,
) -> tuple[Job, Staged]:
    """A job that is in the window, and was to do something before that."""

    def wish_early() -> None:
        if early:
            (job,) = service.jobs()
            wish_of(service, job.id, early)

    staged = Staged(folder, window, wish_early)
    own = JobFolder.locked

    @contextmanager
    def locked(job_folder: JobFolder) -> Iterator[None]:
        with own(job_folder):
            yield
            staged.reach("outcome")
        staged.reach("unlocked")

    monkeypatch.setattr(JobFolder, "locked", locked)
    job = service.submit("cat", STEPS, {}, staged.work())
    assert staged.arrived.wait(LONG_S)
    return job, staged


@pytest.mark.parametrize("window", [*BEFORE_THE_LOOP_IS_LEFT, *AFTERWARDS])
@pytest.mark.parametrize(("early", "late"), COMES_TO)
def test_what_was_wished_last_is_granted_in_every_window_and_whoever_waits_is_released(
    service: TrainingService,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    early: Wish,
    late: Wish,
    window: str,
) -> None:
    job, staged = halted(service, tmp_path, monkeypatch, window, early)
    released = threading.Event()
    waiter = threading.Thread(target=lambda: job.wait(LONG_S) and released.set())
    waiter.start()
    if (early, late) == (STOP, GO_ON):
        with pytest.raises(JobError, match="is being stopped"):
            wish_of(service, job.id, late)
    else:
        wish_of(service, job.id, late)
    staged.go_on.set()
    until_state(job, COMES_TO[early, late])
    learnt = 0 if window == "turn" else 1
    if COMES_TO[early, late] is JobState.STOPPED:
        assert job.snapshot().step == learnt
        assert staged.saved == [1] * learnt
        assert (job.snapshot().concept_file is not None) == bool(learnt)
    if COMES_TO[early, late] is JobState.PAUSED:
        assert job.snapshot().step == learnt and not released.is_set()
        service.resume(job.id)
        until_state(job, JobState.FINISHED)
    waiter.join(LONG_S)
    assert released.is_set()
    if job.snapshot().state is JobState.FINISHED:
        assert staged.steps == [1, 2, 3, 4] and job.losses() == [1.0] * 4
        assert staged.saved == [4]


@pytest.mark.parametrize("late", Wish)
@pytest.mark.parametrize("window", AFTERWARDS)
def test_a_wish_that_comes_after_the_last_step_leaves_a_finished_job(
    service: TrainingService,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    late: Wish,
    window: str,
) -> None:
    job, staged = halted(service, tmp_path, monkeypatch, window, None)
    wish_of(service, job.id, late)
    staged.go_on.set()
    until_state(job, JobState.FINISHED)
    assert staged.saved == [4]


@pytest.mark.parametrize("late", Wish)
def test_a_first_wish_in_the_loop_is_granted(
    service: TrainingService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: Wish
) -> None:
    job, staged = halted(service, tmp_path, monkeypatch, "loop", None)
    wish_of(service, job.id, late)
    staged.go_on.set()
    until = {GO_ON: JobState.FINISHED, PAUSE: JobState.PAUSED, STOP: JobState.STOPPED}
    until_state(job, until[late])


# Jobs that nobody works on

REFUSED = None
AT_REST = {
    ("queued", GO_ON): JobState.QUEUED,
    ("queued", PAUSE): JobState.PAUSED,
    ("queued", STOP): JobState.STOPPED,
    ("queued, begun", GO_ON): JobState.QUEUED,
    ("queued, begun", PAUSE): JobState.PAUSED,
    ("queued, begun", STOP): JobState.QUEUED,  # its turn saves it
    ("to be stopped", GO_ON): JobState.QUEUED,
    ("to be stopped", PAUSE): JobState.QUEUED,
    ("to be stopped", STOP): JobState.QUEUED,
    ("paused", GO_ON): JobState.QUEUED,
    ("paused", PAUSE): JobState.PAUSED,
    ("paused", STOP): JobState.STOPPED,
    ("paused, begun", GO_ON): JobState.QUEUED,
    ("paused, begun", PAUSE): JobState.PAUSED,
    ("paused, begun", STOP): JobState.QUEUED,
    **{(state, GO_ON): REFUSED for state in ("finished", "stopped", "failed")},
    **{(state, PAUSE): REFUSED for state in ("finished", "stopped", "failed")},
    ("finished", STOP): JobState.FINISHED,
    ("stopped", STOP): JobState.STOPPED,
    ("failed", STOP): JobState.FAILED,
}
TURNS_INTO = {
    ("queued", GO_ON): JobState.FINISHED,
    ("queued, begun", GO_ON): JobState.FINISHED,
    ("queued, begun", STOP): JobState.STOPPED,
    ("to be stopped", GO_ON): JobState.FINISHED,
    ("to be stopped", PAUSE): JobState.STOPPED,
    ("to be stopped", STOP): JobState.STOPPED,
    ("paused", GO_ON): JobState.FINISHED,
    ("paused, begun", GO_ON): JobState.FINISHED,
    ("paused, begun", STOP): JobState.STOPPED,
}
"""When the job that is at work lets the others have their turn; what is not here stays."""


def at_rest(service: TrainingService, folder: Path, kind: str) -> tuple[Job, Staged, Staged]:
    """A job in this state, and another one that is at work: both, and what holds that."""
    state, _, begun = kind.partition(", ")
    staged = Staged(folder, "loop" if begun or state in ("to be stopped", "stopped") else "")
    if state == "failed":
        staged.reach = lambda window: 1 / 0  # type: ignore[assignment, return-value]
    if begun or state not in ("queued", "paused"):
        job = service.submit("cat", STEPS, {}, staged.work())
        if state in ("finished", "failed"):
            assert job.wait(LONG_S)
        else:
            assert staged.arrived.wait(LONG_S)
            wish_of(service, job.id, STOP if state == "stopped" else PAUSE)
            staged.go_on.set()
            until_state(job, JobState.STOPPED if state == "stopped" else JobState.PAUSED)
    busy = Staged(folder, "loop")
    service.submit("busy", STEPS, {}, busy.work())
    assert busy.arrived.wait(LONG_S)
    if not begun and state in ("queued", "paused"):
        job = service.submit("cat", STEPS, {}, staged.work())
        if state == "paused":
            service.pause(job.id)
    elif state == "queued":
        service.resume(job.id)
    elif state == "to be stopped":
        service.stop(job.id)
    return job, staged, busy


@pytest.mark.parametrize(("kind", "wish"), AT_REST)
def test_a_job_that_nobody_works_on_becomes_at_once_what_is_wished(
    service: TrainingService, tmp_path: Path, kind: str, wish: Wish
) -> None:
    job, _, busy = at_rest(service, tmp_path, kind)
    began, after = job.snapshot().state, AT_REST[kind, wish]
    if after is REFUSED:
        with pytest.raises(JobError, match=f"is {kind}"):
            wish_of(service, job.id, wish)
    else:
        wish_of(service, job.id, wish)
    assert job.snapshot().state is (after or began)
    busy.go_on.set()
    until_state(job, TURNS_INTO.get((kind, wish), after or began))
    if job.snapshot().state is JobState.PAUSED:
        assert job.is_loaded


def test_the_tables_have_every_cell() -> None:
    over = (JobState.FINISHED, JobState.STOPPED, JobState.FAILED)
    refused = {(state, PAUSE) for state in over}
    assert NEXT_STATE.keys() == set(product(JobState, Wish)) - refused
    assert STANDING.keys() == set(product([None, *Wish], Wish)) - {(STOP, GO_ON)}
