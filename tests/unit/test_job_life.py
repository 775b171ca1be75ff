"""Jobs that are paused, resumed, reordered, deleted, found again after a restart, and shared."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import JobError
from custom_diffusion.concept.file import write_concept
from custom_diffusion.inspection.card import thumbnail
from custom_diffusion.trainer.checkpoint import Checkpoint
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.events import Event
from custom_diffusion.trainer.jobs.folder import JobFolder
from custom_diffusion.trainer.jobs.job import Job
from custom_diffusion.trainer.jobs.own_files import OwnFiles
from custom_diffusion.trainer.jobs.service import TrainingService
from custom_diffusion.trainer.jobs.snapshot import JobState
from custom_diffusion.trainer.jobs.work import Work
from diffusers import StableDiffusionPipeline
from support.concepts import random_concept
from support.tiny_models import RESOLUTION
from support.tiny_training import train_cat

pytestmark = [pytest.mark.slow, pytest.mark.any_version]

LONG_S = 60.0
STEPS = 8
CONFIG = TrainConfig(
    steps=STEPS, batch_size=2, learning_rate=1e-3, resolution=RESOLUTION, preview_every_steps=4
)


class Bench:
    """A service with real trainings of the tiny pipeline, which wait where they are told to."""

    def __init__(self, folder: Path, pipeline: StableDiffusionPipeline) -> None:
        self.folder, self.pipeline = folder, pipeline
        self.service = TrainingService(folder / "jobs")
        self.order: list[str] = []
        """Names of the jobs, as they began or went on"""
        self.busy = False
        self._gates: dict[str, threading.Semaphore] = {}
        self._others: list[Bench] = []

    def restarted(self) -> Bench:
        """The same folder in another process, as far as the service can tell."""
        self._others.append(Bench(self.folder, self.pipeline))
        return self._others[-1]

    def submit(
        self, name: str = "cat", gated: bool = False, fingerprint: str = "", steps: int = STEPS
    ) -> Job:
        gate = self._gates[name] = threading.Semaphore(0 if gated else 10_000)

        def run(
            checkpoint: Checkpoint | None,
            should_stop: Callable[[], bool],
            on_event: Callable[[Event], None],
        ) -> Concept:
            self.order.append(name)

            def leave() -> bool:
                asked = should_stop()
                return asked or (not gate.acquire(timeout=LONG_S) or should_stop())

            config = replace(CONFIG, steps=steps)
            return train_cat(self.pipeline, config, 3, checkpoint, leave, on_event)

        def save(concept: Concept, own_files: OwnFiles) -> Path:
            folder = self.folder / "concepts"
            return own_files.write_named(folder, name, partial(write_concept, concept))

        work = Work(run, save, lambda: self.busy)
        return self.service.submit(name, steps, {}, work, fingerprint)

    def let_go(self) -> None:
        """Ends what still runs: the pipeline is the next test's."""
        for job in self.service.jobs():
            if job.runs_here:
                self.service.stop(job.id)
        for gate in self._gates.values():
            gate.release(10_000)
        self.service.close(LONG_S)
        for other in self._others:
            other.let_go()

    def allow(self, steps: int, name: str = "cat") -> None:
        self._gates[name].release(steps)


@pytest.fixture
def bench(tmp_path: Path, pipeline: StableDiffusionPipeline) -> Iterator[Bench]:
    bench = Bench(tmp_path, pipeline)
    yield bench
    bench.let_go()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.002)


def until_state(job: Job, state: JobState) -> None:
    until(lambda: job.snapshot().state is state)


def content(path: Path | None) -> bytes:
    """The tensors of a concept file, without the header, which holds the time."""
    assert path is not None
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, pipeline: StableDiffusionPipeline
) -> bytes:
    bench = Bench(tmp_path_factory.mktemp("uninterrupted"), pipeline)
    job = bench.submit()
    assert job.wait(LONG_S)
    return content(job.snapshot().concept_file)


def pause_after(bench: Bench, steps: int, job: Job) -> None:
    bench.allow(steps)
    until(lambda: job.snapshot().step == steps)
    bench.service.pause(job.id)
    bench.allow(1)
    until_state(job, JobState.PAUSED)


def test_a_paused_job_goes_on_as_if_it_had_not_been(bench: Bench, uninterrupted: bytes) -> None:
    job = bench.submit(gated=True)
    pause_after(bench, 5, job)
    paused = job.snapshot()
    assert (paused.step, paused.ended) == (5, False)
    assert not job.wait(0)
    bench.allow(STEPS)
    bench.service.resume(job.id)
    assert job.wait(LONG_S)
    assert job.snapshot().state is JobState.FINISHED
    assert bench.order == ["cat", "cat"]
    assert len(job.losses()) == len(job.folder.losses()) == STEPS
    assert content(job.snapshot().concept_file) == uninterrupted


def test_a_paused_job_lets_others_go_first_and_comes_before_those_that_wait(bench: Bench) -> None:
    job = bench.submit(gated=True)
    waiting = [bench.submit(name, gated=True) for name in "abc"]
    pause_after(bench, 2, job)
    until(lambda: bench.order == ["cat", "a"])
    bench.service.resume(job.id)
    assert bench.service.queued() == [job.id, waiting[1].id, waiting[2].id]
    for name in "abc":
        bench.allow(STEPS, name)
    bench.allow(STEPS)
    assert all(other.wait(LONG_S) for other in [job, *waiting])
    assert bench.order == ["cat", "a", "cat", "b", "c"]


def test_pausing_and_resuming_what_is_so_already_changes_nothing(bench: Bench) -> None:
    job = bench.submit(gated=True)
    pause_after(bench, 1, job)
    bench.service.pause(job.id)
    assert job.snapshot().state is JobState.PAUSED
    bench.allow(STEPS)
    for _ in range(3):
        bench.service.resume(job.id)
    assert job.wait(LONG_S)
    assert bench.order == ["cat", "cat"]
    with pytest.raises(JobError, match=r"is finished\."):
        bench.service.pause(job.id)


def test_resuming_before_it_has_paused_takes_the_wish_back(bench: Bench) -> None:
    job = bench.submit(gated=True)
    bench.allow(2)
    until(lambda: job.snapshot().step == 2)
    bench.service.pause(job.id)
    bench.service.resume(job.id)
    bench.allow(STEPS)
    assert job.wait(LONG_S)
    assert (job.snapshot().state, bench.order) == (JobState.FINISHED, ["cat"])


def test_a_job_in_the_queue_can_be_paused(bench: Bench) -> None:
    first, second = bench.submit("first", gated=True), bench.submit("second")
    bench.service.pause(second.id)
    assert second.snapshot().state is JobState.PAUSED
    assert second.id not in bench.service.queued()
    bench.allow(STEPS, "first")
    assert first.wait(LONG_S)
    assert not second.wait(0)
    bench.service.resume(second.id)
    assert second.wait(LONG_S)
    assert bench.order == ["first", "second"]


def test_stopping_a_paused_job_saves_what_it_learnt(bench: Bench) -> None:
    job = bench.submit(gated=True)
    pause_after(bench, 5, job)
    bench.service.stop(job.id)
    assert job.wait(LONG_S)
    stopped = job.snapshot()
    assert (stopped.state, stopped.step) == (JobState.STOPPED, 5)
    newest = job.folder.newest_concept()
    assert content(stopped.concept_file) == content(newest)
    assert stopped.concept_file != newest


def test_waiting_jobs_are_reordered(bench: Bench) -> None:
    jobs = {name: bench.submit(name, gated=name == "a") for name in "abcd"}
    until(lambda: bench.order == ["a"])
    bench.service.reorder(jobs["d"].id, 0)
    bench.service.reorder(jobs["b"].id, 99)
    assert bench.service.queued() == [jobs[name].id for name in "dcb"]
    with pytest.raises(JobError, match="does not wait for its turn; those that do: .*-d, .*-c"):
        bench.service.reorder(jobs["a"].id, 0)
    bench.allow(STEPS, "a")
    assert all(job.wait(LONG_S) for job in jobs.values())
    assert bench.order == list("adcb")


def test_a_deleted_job_is_gone_and_its_concept_stays(bench: Bench) -> None:
    job = bench.submit()
    assert job.wait(LONG_S)
    bench.service.delete(job.id)
    assert not job.folder.path.exists()
    assert bench.service.jobs() == []
    assert job.snapshot().concept_file is not None
    assert job.snapshot().concept_file.is_file()  # type: ignore[union-attr]
    with pytest.raises(JobError, match="There is no training job"):
        bench.service.delete(job.id)


def test_a_job_at_work_is_not_deleted(bench: Bench) -> None:
    job = bench.submit(gated=True)
    until(lambda: bench.order == ["cat"])
    with pytest.raises(JobError, match=r"is at work\. Stop or pause it first"):
        bench.service.delete(job.id)
    pause_after(bench, 1, job)
    bench.service.delete(job.id)
    assert bench.service.jobs() == []
    assert job.wait(0)  # whoever waits for it need not wait any longer


def test_a_folder_that_somebody_removed_is_no_job_any_more(bench: Bench) -> None:
    job = bench.submit()
    assert job.wait(LONG_S)
    other = bench.restarted()
    assert [seen.id for seen in other.service.jobs()] == [job.id]
    shutil.rmtree(job.folder.path)
    assert bench.service.jobs() == other.service.jobs() == []
    assert not job.folder.path.exists()


def test_a_loss_that_is_not_a_number_costs_the_steps_since_the_last_checkpoint(
    bench: Bench, uninterrupted: bytes
) -> None:
    def spoil(_unet: object, _given: object, output: Any) -> None:
        if job.snapshot().step == 5:
            output[0].fill_(float("nan"))

    job = bench.submit(gated=True, fingerprint="same")
    with_nan = bench.pipeline.unet.register_forward_hook(spoil)
    try:
        bench.allow(STEPS)
        assert job.wait(LONG_S)
    finally:
        with_nan.remove()
    failed = job.snapshot()
    assert failed.state is JobState.FAILED and "The loss became nan at step 6" in failed.error
    assert (failed.step, job.folder.newest_step()) == (5, 3)
    assert bench.submit(fingerprint="same") is job
    assert job.wait(LONG_S)
    assert content(job.snapshot().concept_file) == uninterrupted


# After a restart


def test_after_a_restart_a_job_goes_on_when_the_same_is_asked_for(
    bench: Bench, uninterrupted: bytes
) -> None:
    job = bench.submit(gated=True, fingerprint="same")
    pause_after(bench, 5, job)
    again = bench.restarted()
    (found,) = again.service.jobs()
    assert (found.id, found.snapshot()) == (job.id, replace(_plain(job), notes=()))
    assert found.losses() == job.losses()
    with pytest.raises(JobError, match=r"paused at step 5 of 8, .* Queue the graph again"):
        again.service.resume(found.id)
    assert again.submit(fingerprint="same") is found
    assert found.wait(LONG_S)
    assert content(found.snapshot().concept_file) == uninterrupted
    assert len(again.service.jobs()) == 1


def _plain(job: Job) -> object:
    """What is left of a snapshot on disk."""
    return replace(
        job.snapshot(), loss=None, preview_hwc=None, preview_step=0, seconds_per_step=None
    )


def test_the_same_is_not_learnt_twice(bench: Bench) -> None:
    first = bench.submit(fingerprint="same")
    assert bench.submit(fingerprint="same") is first
    assert first.wait(LONG_S)
    assert bench.submit(fingerprint="same") is first
    again = bench.restarted()
    assert again.submit(fingerprint="same").id == first.id
    assert bench.order == ["cat"] and again.order == []
    assert bench.submit(fingerprint="other").wait(LONG_S)
    assert first.snapshot().concept_file is not None
    first.snapshot().concept_file.unlink()  # type: ignore[union-attr]
    assert again.submit(fingerprint="same").id != first.id


def test_a_finished_job_whose_name_another_file_has_is_not_handed_out(bench: Bench) -> None:
    job = bench.submit(fingerprint="same")
    assert job.wait(LONG_S)
    file = job.snapshot().concept_file
    assert file is not None and bench.submit(fingerprint="same") is job
    file.write_bytes(b"of somebody else")
    again = bench.submit(fingerprint="same")
    assert again is not job and again.wait(LONG_S)
    assert again.snapshot().concept_file != file
    assert file.read_bytes() == b"of somebody else"


def test_more_steps_go_on_from_a_shorter_training(bench: Bench, uninterrupted: bytes) -> None:
    shorter = bench.submit(fingerprint="same", steps=4)
    assert shorter.wait(LONG_S)
    longer = bench.submit(gated=True, fingerprint="same")
    bench.allow(STEPS - 4)
    assert longer.wait(LONG_S)
    snapshot = longer.snapshot()
    assert content(snapshot.concept_file) == uninterrupted
    assert longer.losses()[:4] == shorter.losses()
    assert shorter.snapshot().step == 4 and shorter.snapshot().concept_file is not None
    assert bench.submit(fingerprint="same", steps=4) is shorter
    # No checkpoint is left of so few steps: it has to be trained.
    fewer = bench.submit(gated=True, fingerprint="same", steps=2)
    bench.allow(1)
    until(lambda: fewer.snapshot().step == 1)


def test_a_stopped_job_goes_on_when_it_is_asked_for_again(
    bench: Bench, uninterrupted: bytes
) -> None:
    job = bench.submit(gated=True, fingerprint="same")
    bench.allow(4)
    until(lambda: job.snapshot().step == 4)
    bench.service.stop(job.id)
    bench.allow(1)
    assert job.wait(LONG_S)
    assert bench.submit(fingerprint="same") is job
    assert job.wait(LONG_S)
    assert job.snapshot().state is JobState.FINISHED
    assert content(job.snapshot().concept_file) == uninterrupted
    # In the place of what it had saved by then
    assert len(list((bench.folder / "concepts").glob("*.safetensors"))) == 1


def test_stopping_a_job_of_a_process_that_is_gone_hands_out_its_last_checkpoint(
    bench: Bench,
) -> None:
    job = bench.submit(gated=True)
    pause_after(bench, 5, job)
    again = bench.restarted()
    again.service.stop(job.id)
    stopped = again.service.job(job.id).snapshot()
    assert (stopped.state, stopped.step) == (JobState.STOPPED, 5)
    assert stopped.concept_file == job.folder.newest_concept()


def test_a_job_of_another_process_is_only_looked_at(bench: Bench) -> None:
    job = bench.submit(gated=True, fingerprint="same")
    bench.allow(3)
    until(lambda: job.snapshot().step == 3)
    other = bench.restarted()
    (seen,) = other.service.jobs()
    until(lambda: seen.snapshot().step == 3)  # its checkpoint
    assert seen.snapshot().state is JobState.RUNNING
    assert seen.losses() == job.losses()
    for refused in (
        lambda: other.service.pause(seen.id),
        lambda: other.service.stop(seen.id),
        lambda: other.service.resume(seen.id),
        lambda: other.submit(fingerprint="same"),
    ):
        with pytest.raises(JobError, match="is running in another process"):
            refused()
    with pytest.raises(JobError, match="is at work"):
        other.service.delete(seen.id)
    bench.allow(STEPS)
    assert job.wait(LONG_S)
    assert seen.snapshot().state is JobState.FINISHED


def test_closing_writes_a_checkpoint(bench: Bench) -> None:
    job = bench.submit(gated=True)
    bench.allow(4)
    until(lambda: job.snapshot().step == 4)
    closing = threading.Thread(target=bench.service.close, args=(LONG_S,))
    closing.start()
    bench.allow(1)
    closing.join(LONG_S)
    assert job.snapshot().state is JobState.PAUSED
    assert job.folder.newest_step() in (4, 5)


# In company


def test_a_job_waits_between_steps_while_somebody_else_is_busy(bench: Bench) -> None:
    job = bench.submit(gated=True)
    bench.allow(2)
    until(lambda: job.snapshot().step == 2)
    bench.busy = True
    bench.allow(STEPS)
    until(lambda: job.snapshot().waiting)
    step = job.snapshot().step
    pause_s = 1.5
    time.sleep(pause_s)
    assert job.snapshot().step == step < STEPS
    bench.busy = False
    assert job.wait(LONG_S)
    assert not job.snapshot().waiting
    assert job.snapshot().seconds_per_step < pause_s  # type: ignore[operator]


def test_a_waiting_job_can_be_paused(bench: Bench) -> None:
    bench.busy = True
    job = bench.submit()
    until(lambda: job.snapshot().waiting)
    bench.service.pause(job.id)
    until_state(job, JobState.PAUSED)


def test_a_concept_has_the_newest_sample_beside_it(bench: Bench) -> None:
    job = bench.submit()
    assert job.wait(LONG_S)
    file = job.snapshot().concept_file
    assert file is not None
    picture = thumbnail(file)
    assert picture is not None
    assert picture.read_bytes() == job.folder.samples()[STEPS].read_bytes()


def test_as_many_of_the_best_are_kept_as_is_asked_for(tmp_path: Path) -> None:
    folder = JobFolder.create(tmp_path, "cat", {"steps": 6, "keep_best": 2})
    concept = random_concept()
    with folder.metrics.after([]):
        for step, loss in enumerate([5.0, 1.0, 3.0, 2.0, 4.0, 9.0], start=1):
            folder.metrics.add(step, loss)
            folder.write_concept(concept, step)
    # Means of the losses before 1 to 6: 5, 3, 3, 2.75, 3, 4.
    kept = [int(path.stem) for path in sorted((folder.path / "concepts").iterdir())]
    assert kept == [2, 4, 6]
    best = folder.best_concept()
    assert best is not None and int(best.stem) == 4


def test_the_folder_keeps_the_newest_and_the_best(bench: Bench) -> None:
    job = bench.submit()
    assert job.wait(LONG_S)
    folder = job.folder.path
    assert sorted(p.stem for p in (folder / "checkpoints").iterdir()) == ["000000006", "000000008"]
    kept = {int(p.stem) for p in (folder / "concepts").iterdir()}
    assert 8 in kept and len(kept) <= 2
    assert list(job.folder.samples()) == [4, 8]


def test_a_listener_that_fails_does_not_end_a_training(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def listener(job: Job) -> None:
        raise RuntimeError("a bad listener")

    bench.service = TrainingService(bench.folder / "jobs", listener)
    job = bench.submit()
    assert job.wait(LONG_S)
    assert job.snapshot().state is JobState.FINISHED
    assert "a bad listener" in caplog.text


def test_nothing_is_left_of_fifty_jobs(bench: Bench) -> None:
    threads = threading.active_count()
    for _ in range(50):
        job = bench.service.submit("empty", 1, {}, _nothing_to_do(bench))
        assert job.wait(LONG_S)
    until(lambda: threading.active_count() == threads)


def _nothing_to_do(bench: Bench) -> Work:
    def run(*_: object) -> Concept:
        raise ValueError("nothing to do")

    return Work(run, lambda concept, own_files: Path())


def test_folders_that_are_no_jobs_are_left_alone_and_broken_ones_say_why(
    bench: Bench, tmp_path: Path
) -> None:
    (tmp_path / "jobs" / "mine").mkdir(parents=True)
    broken = tmp_path / "jobs" / "broken"
    broken.mkdir()
    (broken / "job.json").write_text('{"name": 3}')
    (job,) = bench.service.jobs()
    assert job.folder.path == broken
    assert job.snapshot().state is JobState.FAILED
    assert "its name is 3; needed: a text" in job.snapshot().error
