"""What a job holds, and when: models from its turn on, and none while it waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import JobError, ModelsGoneError
from custom_diffusion.trainer.checkpoint import Checkpoint
from custom_diffusion.trainer.events import CheckpointDue, StepDone
from custom_diffusion.trainer.jobs.job import Job
from custom_diffusion.trainer.jobs.own_files import OwnFiles
from custom_diffusion.trainer.jobs.service import TrainingService
from custom_diffusion.trainer.jobs.snapshot import JobState
from custom_diffusion.trainer.jobs.work import Work
from support.concepts import random_concept

LONG_S = 30.0


class Training:
    """Counts its steps, and what is held meanwhile."""

    held: list[str] = []
    most_held = 0

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._folder = name, folder
        self.gone = False
        self.gate = threading.Semaphore(0)
        self.blocked = threading.Event()
        """Set while others have the device at its turn"""

    def work(self) -> Work:
        return Work(self.train, self.save, turn=self.turn, has_models=lambda: not self.gone)

    @contextmanager
    def turn(self, should_leave: Callable[[], bool]) -> Iterator[bool]:
        while self.blocked.is_set():
            if should_leave():
                yield False
                return
            time.sleep(0.01)
        if self.gone:
            raise ModelsGoneError("its models are gone")
        self.held.append(self.name)
        Training.most_held = max(Training.most_held, len(self.held))
        try:
            yield True
        finally:
            self.held.remove(self.name)

    def train(
        self, checkpoint: Checkpoint | None, should_stop: Callable[[], bool], on_event: object
    ) -> Concept:
        assert self.held == [self.name] and callable(on_event)
        losses = list(checkpoint.losses) if checkpoint else []
        while len(losses) < 3 and not should_stop():
            assert self.gate.acquire(timeout=LONG_S)
            losses.append(1.0)
            on_event(StepDone(len(losses), 1.0))
            concept = random_concept()
            on_event(CheckpointDue(Checkpoint(tuple(losses), (torch.zeros(1),), ({},)), concept))
        return random_concept()

    def save(self, concept: Concept, own_files: OwnFiles) -> Path:
        assert self.held == [self.name], "a method that trains the network saves it"
        return self._folder / f"{self.name}.safetensors"


@pytest.fixture
def idle() -> list[bool]:
    """Grows when the service has nothing left to do."""
    return []


@pytest.fixture
def service(tmp_path: Path, idle: list[bool]) -> Iterator[TrainingService]:
    Training.held, Training.most_held = [], 0
    service = TrainingService(tmp_path / "jobs", on_idle=lambda: idle.append(True))
    yield service
    service.close(LONG_S)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.002)


def until_state(job: Job, state: JobState) -> None:
    until(lambda: job.snapshot().state is state)


def test_ten_jobs_hold_models_one_after_the_other(
    service: TrainingService, tmp_path: Path, idle: list[bool]
) -> None:
    trainings = [Training(f"job {number}", tmp_path) for number in range(10)]
    next_ones: list[str] = []
    jobs = [
        service.submit(t.name, 3, {}, t.work(), on_next=lambda t=t: next_ones.append(t.name))  # type: ignore[misc]
        for t in trainings
    ]
    assert next_ones == ["job 0"], "the others have to wait"
    for training in trainings:
        training.gate.release(3)
    assert all(job.wait(LONG_S) for job in jobs)
    assert {job.snapshot().state for job in jobs} == {JobState.FINISHED}
    assert Training.most_held == 1 and Training.held == []
    until(lambda: idle)
    assert len(idle) == 1


def test_a_paused_job_holds_nothing_and_goes_on(service: TrainingService, tmp_path: Path) -> None:
    training = Training("cat", tmp_path)
    job = service.submit("cat", 3, {}, training.work())
    training.gate.release(1)
    until(lambda: job.snapshot().step == 1)
    service.pause(job.id)
    training.gate.release(1)
    until_state(job, JobState.PAUSED)
    assert Training.held == [] and job.is_loaded
    service.resume(job.id)
    training.gate.release(2)
    assert job.wait(LONG_S) and job.snapshot().state is JobState.FINISHED


def test_a_job_whose_models_are_gone_at_its_turn_says_so_and_waits(
    service: TrainingService, tmp_path: Path
) -> None:
    training, other = Training("cat", tmp_path), Training("other", tmp_path)
    training.gone = True
    job = service.submit("cat", 3, {}, training.work(), "the same")
    after = service.submit("other", 3, {}, other.work())
    other.gate.release(3)
    assert after.wait(LONG_S)
    told = job.snapshot()
    assert (told.state, told.notes) == (JobState.PAUSED, ("its models are gone",))
    assert not job.is_loaded
    with pytest.raises(JobError, match="Queue the graph again"):
        service.resume(job.id)
    back = Training("cat", tmp_path)
    back.gate.release(3)
    assert service.submit("cat", 3, {}, back.work(), "the same") is job
    assert job.wait(LONG_S) and job.snapshot().state is JobState.FINISHED


def test_a_paused_job_whose_models_are_gone_is_stopped_with_what_it_had_learnt(
    service: TrainingService, tmp_path: Path
) -> None:
    training = Training("cat", tmp_path)
    job = service.submit("cat", 3, {}, training.work())
    training.gate.release(1)
    until(lambda: job.snapshot().step == 1)
    service.pause(job.id)
    training.gate.release(1)
    until_state(job, JobState.PAUSED)
    training.gone = True
    service.stop(job.id)
    told = job.snapshot()
    assert told.state is JobState.STOPPED
    assert told.concept_file == job.folder.newest_concept() is not None


@pytest.mark.parametrize("wish", [JobState.PAUSED, JobState.STOPPED])
def test_a_job_that_waits_for_its_models_can_be_left(
    service: TrainingService, tmp_path: Path, wish: JobState
) -> None:
    training = Training("cat", tmp_path)
    training.blocked.set()
    job = service.submit("cat", 3, {}, training.work())
    until_state(job, JobState.PREPARING)
    (service.pause if wish is JobState.PAUSED else service.stop)(job.id)
    until_state(job, wish)
    assert job.snapshot().step == 0 and Training.most_held == 0
    if wish is JobState.PAUSED:
        training.blocked.clear()
        training.gate.release(3)
        service.resume(job.id)
        assert job.wait(LONG_S) and job.snapshot().state is JobState.FINISHED
