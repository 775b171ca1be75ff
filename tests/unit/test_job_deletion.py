"""Who may delete a job, and that nothing is lost, left or in the way when it is deleted: also where
files cannot be removed while a program has them open.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.cli import main
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.delta import DenseDelta
from custom_diffusion.concept.errors import JobError
from custom_diffusion.concept.file import write_new_concept
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.trainer.checkpoint import Checkpoint, read_checkpoint
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.events import CheckpointDue, Event, StepDone
from custom_diffusion.trainer.jobs.folder import JobFolder
from custom_diffusion.trainer.jobs.job import Job
from custom_diffusion.trainer.jobs.service import TrainingService
from custom_diffusion.trainer.jobs.snapshot import JobState
from custom_diffusion.trainer.jobs.trash import delete_folder
from custom_diffusion.trainer.jobs.work import Work
from diffusers import StableDiffusionPipeline
from support.odd_jobs import good_job
from support.second_process import SecondProcess, endless
from support.tiny_models import RESOLUTION
from support.tiny_training import train_cat
from support.windows import as_on_windows, files_in_use

pytestmark = [pytest.mark.slow, pytest.mark.any_version]

LONG_S = 60.0
LAYER = "output_blocks.3.1.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_windows(monkeypatch)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


def counting(
    folder: Path, steps: int, after_step: Callable[[int], object] = lambda step: None
) -> Work:
    """A checkpoint and a concept after each step."""

    def train(
        checkpoint: Checkpoint | None,
        should_stop: Callable[[], bool],
        on_event: Callable[[Event], None],
    ) -> Concept:
        losses = list(checkpoint.losses) if checkpoint else []
        concept = Concept(FAMILIES["sd15"], {LAYER: DenseDelta(torch.ones(4, 768))})
        while len(losses) < steps and not should_stop():
            losses.append(1.0 + len(losses))
            on_event(StepDone(len(losses), losses[-1]))
            on_event(CheckpointDue(Checkpoint(tuple(losses), (torch.ones(9),), ({},)), concept))
            after_step(len(losses))
        return concept

    return Work(
        train, lambda concept, own_files: write_new_concept(concept, folder / "concepts", "cat")
    )


def names(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.iterdir())


def test_windows_is_as_it_is_said_to_be(tmp_path: Path, windows: None) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path, other = folder / "file", tmp_path / "other"
    path.write_text("x")
    other.write_text("y")
    with open(path):
        for refused in (path.unlink, lambda: os.remove(path), lambda: other.replace(path)):
            with pytest.raises(PermissionError, match="used by another process"):
                refused()
        with pytest.raises(PermissionError):
            folder.rename(tmp_path / "elsewhere")
    mapped = torch.from_file(str(path), size=1, dtype=torch.uint8)
    with pytest.raises(PermissionError):
        path.unlink()
    del mapped
    folder.rename(tmp_path / "elsewhere")


def test_a_training_goes_on_after_a_pause_and_prunes_and_is_deleted(
    tmp_path: Path, windows: None, pipeline: StableDiffusionPipeline
) -> None:
    """A real one, through its whole life, with a checkpoint every second step."""
    steps, gate = 12, threading.Semaphore(4)
    config = TrainConfig(
        steps=steps, batch_size=2, learning_rate=1e-3, resolution=RESOLUTION, preview_every_steps=3
    )

    def run(checkpoint: Checkpoint | None, should_stop: Any, on_event: Any) -> Concept:
        def leave() -> bool:
            return bool(should_stop() or not gate.acquire(timeout=LONG_S) or should_stop())

        return train_cat(pipeline, config, 2, checkpoint, leave, on_event)

    save = lambda concept, own_files: write_new_concept(concept, tmp_path / "concepts", "cat")  # noqa: E731
    service = TrainingService(tmp_path / "jobs")
    job = service.submit("cat", steps, {}, Work(run, save), "same")
    until(lambda: job.snapshot().step == 4)
    service.pause(job.id)
    gate.release()
    until(lambda: job.snapshot().state is JobState.PAUSED)
    gate.release(100)
    service.resume(job.id)
    assert job.wait(LONG_S)
    done = job.snapshot()
    assert (done.state, done.error, done.notes) == (JobState.FINISHED, "", ())
    assert names(job.folder.path / "checkpoints") == [10, 12]
    assert len(names(job.folder.path / "concepts")) <= 2
    service.delete(job.id)
    assert list((tmp_path / "jobs").iterdir()) == []
    assert done.concept_file is not None and done.concept_file.is_file()


def test_a_checkpoint_that_was_read_is_nobodys_file_any_more(tmp_path: Path) -> None:
    service = TrainingService(tmp_path / "jobs")
    job = service.submit("cat", 3, {}, counting(tmp_path, 3))
    assert job.wait(LONG_S)
    path = job.folder.path / "checkpoints" / "000000003.safetensors"
    checkpoint = read_checkpoint(path)
    assert str(path) not in files_in_use()
    path.write_bytes(bytes(path.stat().st_size))
    os.truncate(path, 0)
    assert torch.equal(checkpoint.parameters[0], torch.ones(9))


def test_a_prune_that_fails_is_told_once_and_tried_again(tmp_path: Path, windows: None) -> None:
    held: list[Any] = []
    folder = tmp_path / "jobs"

    def after_step(step: int) -> None:
        if step == 1:
            (job_folder,) = folder.iterdir()
            held.append((job_folder / "checkpoints" / "000000001.safetensors").open("rb"))
        if step == 6:
            held.pop().close()
        left.append(names(next(folder.iterdir()) / "checkpoints"))

    left: list[list[int]] = []
    service = TrainingService(folder)
    job = service.submit("cat", 8, {}, counting(tmp_path, 8, after_step))
    assert job.wait(LONG_S)
    assert job.snapshot().state is JobState.FINISHED
    assert left == [[1], [1, 2], [1, 2, 3], [1, 3, 4], [1, 4, 5], [1, 5, 6], [6, 7], [7, 8]]
    (note,) = job.snapshot().notes
    assert "000000001.safetensors is not needed any more and could not be removed" in note
    assert "tried again at the next checkpoint" in note


@pytest.mark.parametrize("kind", ["checkpoints", "concepts"])
def test_what_is_in_use_until_the_end_stays_and_that_is_on_disk(
    tmp_path: Path, windows: None, kind: str
) -> None:
    held: list[Any] = []

    def after_step(step: int) -> None:
        if step == 2:
            (folder,) = (tmp_path / "jobs").iterdir()
            held.append((folder / kind / "000000002.safetensors").open("rb"))

    service = TrainingService(tmp_path / "jobs")
    job = service.submit("cat", 6, {}, counting(tmp_path, 6, after_step))
    assert job.wait(LONG_S)
    (seen,) = TrainingService(tmp_path / "jobs").jobs()
    assert seen.snapshot().state is JobState.FINISHED
    (note,) = seen.snapshot().notes
    assert f"{kind}/000000002.safetensors" in note
    assert 2 in names(job.folder.path / kind)
    held.pop().close()


# Deleting


@pytest.fixture
def ended(tmp_path: Path) -> tuple[TrainingService, Job]:
    service = TrainingService(tmp_path / "jobs")
    job = service.submit("cat", 3, {}, counting(tmp_path, 3))
    assert job.wait(LONG_S)
    return service, job


def test_a_file_in_use_keeps_the_job_whole_and_listed(
    ended: tuple[TrainingService, Job], windows: None, capsys: pytest.CaptureFixture[str]
) -> None:
    service, job = ended
    path = job.folder.path / "checkpoints" / "000000003.safetensors"
    before = sorted(job.folder.path.rglob("*"))
    with open(path, "rb"):
        with pytest.raises(JobError) as caught:
            service.delete(job.id)
        assert main(["jobs", "delete", str(job.folder.path.parent), job.id]) == 1
    for said in (str(caught.value), capsys.readouterr().err):
        assert f"Close the programs that hold {path}" in said and "nothing of it was" in said
    assert sorted(job.folder.path.rglob("*")) == before
    assert [seen.id for seen in service.jobs()] == [job.id] and service.deleted == 0
    service.delete(job.id)
    assert list(job.folder.path.parent.iterdir()) == []


def test_what_cannot_be_removed_is_told_and_removed_later(
    ended: tuple[TrainingService, Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, job = ended
    jobs, unlink = job.folder.path.parent, os.unlink

    def scanned(path: Any, **options: Any) -> None:
        if str(path).endswith("000000002.safetensors"):
            raise PermissionError(13, "in use", path)
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", scanned)
        with pytest.raises(JobError) as caught:
            service.delete(job.id)
    (trash,) = jobs.iterdir()
    left = [path for path in trash.rglob("*") if path.is_file()]
    assert [path.name for path in left] == ["000000002.safetensors"]
    assert f"is deleted, but of its files {left[0]} could not be removed" in str(caught.value)
    assert service.jobs() == TrainingService(jobs).jobs() == [] and service.deleted == 1
    assert job.wait(0)
    assert list(jobs.iterdir()) == []  # the second service has started


def test_the_rest_of_an_interrupted_deletion_is_no_job_and_goes_with_the_next(
    ended: tuple[TrainingService, Job],
) -> None:
    service, job = ended
    jobs = job.folder.path.parent
    rest = good_job(jobs / ".deleted-0123")
    assert [seen.id for seen in service.jobs()] == [job.id]
    service.delete(job.id)
    assert not rest.exists()
    good_job(rest)
    assert TrainingService(jobs).jobs() == []
    assert not rest.exists()


def test_what_a_link_points_at_is_not_removed(tmp_path: Path) -> None:
    elsewhere = good_job(tmp_path / "elsewhere")
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    (jobs / "link").symlink_to(elsewhere)
    TrainingService(jobs).delete("link")
    assert (elsewhere / "job.json").is_file()
    assert list(jobs.iterdir()) == []


def test_a_job_that_is_begun_while_it_is_deleted_is_kept(tmp_path: Path) -> None:
    folder = good_job(tmp_path / "job")
    asked: list[Path] = []

    def check_free(path: Path) -> None:
        asked.append(path)
        if len(asked) == 2:
            assert not folder.exists()
            raise JobError("somebody was quicker")

    with pytest.raises(JobError, match="quicker"):
        delete_folder(folder, check_free)
    assert asked[1] != folder
    assert [path.name for path in folder.iterdir()] == ["job.json"]


# Other processes


@pytest.fixture
def other(tmp_path: Path) -> Iterator[SecondProcess]:
    with SecondProcess(tmp_path / "jobs") as process:
        yield process


def test_a_job_in_another_processs_queue_is_left_to_it(
    tmp_path: Path, other: SecondProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    running, queued = other("busy", "first"), other("queue", "second")
    service = TrainingService(tmp_path / "jobs")
    states = {job.id: job.snapshot().state for job in service.jobs()}
    assert states == {running: JobState.RUNNING, queued: JobState.QUEUED}
    for job_id, what in ((running, "is at work"), (queued, "waits for its turn")):
        with pytest.raises(JobError, match=f"{job_id} {what} in another process"):
            service.delete(job_id)
        assert main(["jobs", "delete", str(tmp_path / "jobs"), job_id]) == 1
        assert f"{what} in another process" in capsys.readouterr().err
        for act in (service.pause, service.stop, service.resume):
            with pytest.raises(JobError, match="in another process: do it there"):
                act(job_id)
    with pytest.raises(JobError, match="is queued in another process"):
        service.submit("second", 5, {}, counting(tmp_path, 5), "second")
    assert other("state", queued) == "queued"
    assert other("pause", queued) == "done"  # now it is nobody's
    assert service.job(queued).snapshot().state is JobState.PAUSED
    service.delete(queued)
    assert "no training job" in other("state", queued)


def test_the_death_of_a_process_sets_its_jobs_free(tmp_path: Path, other: SecondProcess) -> None:
    running, queued = other("busy", "first"), other("queue", "second")
    service = TrainingService(tmp_path / "jobs")
    other.kill()
    assert {job.snapshot().state for job in service.jobs()} == {JobState.PAUSED}
    service.delete(queued)
    job = service.submit("first", 5, {}, counting(tmp_path, 5), "first")
    assert job.id == running and job.wait(LONG_S)
    assert job.snapshot().state is JobState.FINISHED


def test_a_job_that_is_queued_here_is_left_alone_there(
    tmp_path: Path, other: SecondProcess
) -> None:
    service, began = TrainingService(tmp_path / "jobs"), threading.Event()
    running = service.submit("first", 5, {}, endless(began, tmp_path), "first")
    assert began.wait(LONG_S)
    queued = service.submit("second", 5, {}, endless(began, tmp_path), "second")
    for verb in ("delete", "stop", "pause", "resume"):
        assert "in another process" in other(verb, queued.id)
        assert "in another process" in other(verb, running.id)
    assert "in another process" in other("queue", "second")
    service.stop(queued.id)
    assert other("state", queued.id) == "stopped"
    assert other("delete", queued.id) == "done"
    service.stop(running.id)
    assert running.wait(LONG_S)
    assert other("delete", running.id) == "done"
    assert service.jobs() == []


def test_a_paused_job_is_whose_goes_on_with_it_first(tmp_path: Path, other: SecondProcess) -> None:
    service, began = TrainingService(tmp_path / "jobs"), threading.Event()
    job = service.submit("cat", 5, {}, endless(began, tmp_path), "cat")
    assert began.wait(LONG_S)
    service.pause(job.id)
    until(lambda: job.snapshot().state is JobState.PAUSED)
    assert job.is_loaded
    assert other("busy", "cat") == job.id
    until(lambda: job.snapshot().state is JobState.RUNNING)
    assert not job.is_loaded  # what it held is free to go
    with pytest.raises(JobError, match="in another process"):
        service.resume(job.id)
    assert other("stop", job.id) == "done"
    until(lambda: job.snapshot().state is JobState.STOPPED)
    assert job.wait(0)


def test_a_paused_job_that_is_deleted_elsewhere_ends_for_those_who_wait(
    tmp_path: Path, other: SecondProcess
) -> None:
    service, began = TrainingService(tmp_path / "jobs"), threading.Event()
    job = service.submit("cat", 5, {}, endless(began, tmp_path), "cat")
    assert began.wait(LONG_S)
    service.pause(job.id)
    until(lambda: job.snapshot().state is JobState.PAUSED)
    assert other("delete", job.id) == "done"
    assert service.jobs() == []
    assert job.wait(0) and not job.is_loaded


def test_a_lock_that_is_a_link_leaves_its_target_alone(tmp_path: Path) -> None:
    """Locking a file may empty it."""
    folder = JobFolder(good_job(tmp_path / "jobs" / "a", fingerprint="a"))
    (tmp_path / "mine").write_text("dear to me")
    for lock in (".lock", ".claim"):
        (folder.path / lock).symlink_to(tmp_path / "mine")
    service = TrainingService(tmp_path / "jobs")
    job = service.submit("a", 8, {}, counting(tmp_path, 8), "a")
    assert job.wait(LONG_S)
    assert job.snapshot().state is JobState.FAILED and "is a link" in job.snapshot().error
    assert (tmp_path / "mine").read_text() == "dear to me"
