"""What accidents cost a job: at most the steps since its last checkpoint."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.delta import DenseDelta
from custom_diffusion.concept.errors import CustomDiffusionError, JobError
from custom_diffusion.concept.file import write_new_concept
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.host.diffusers.lending import borrowed_models
from custom_diffusion.trainer.checkpoint import Checkpoint, read_checkpoint
from custom_diffusion.trainer.data.folders import load_folder
from custom_diffusion.trainer.events import CheckpointDue, Event, PreviewDrawn, StepDone
from custom_diffusion.trainer.jobs.folder import JobFolder
from custom_diffusion.trainer.jobs.job import Job
from custom_diffusion.trainer.jobs.service import TrainingService
from custom_diffusion.trainer.jobs.snapshot import JobState
from custom_diffusion.trainer.jobs.work import Work
from custom_diffusion.trainer.loop import train
from custom_diffusion.trainer.prepare import prepare
from diffusers import StableDiffusionPipeline
from support.graphs import draw_pictures
from support.killed_training import CONFIG, Processes
from support.tiny_models import cat_concept

pytestmark = [pytest.mark.slow, pytest.mark.any_version]

LONG_S = 120.0
KILLS = 50
NOBODY = 65534
UNHARMED = (JobState.PAUSED, JobState.FINISHED)


def tensors(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_a_job_killed_fifty_times_learns_what_one_learns_that_was_not(tmp_path: Path) -> None:
    """Killed at random moments, every fifth time in the middle of writing a file."""
    rng = random.Random(0)
    lost: list[int] = []
    lives = 0
    with Processes() as processes:
        for name in ("first", "whole"):  # the first has to wait for imports
            started = time.monotonic()
            processes.start(tmp_path / name)
            assert processes.exit_code() == 0
            whole_s = time.monotonic() - started
        whole = tmp_path / "whole" / "concepts" / "cat.safetensors"
        while len(lost) < KILLS:
            lives += 1
            folder = tmp_path / f"killed {lives}"
            while True:
                in_write = rng.randint(1, 5) if len(lost) % 5 == 4 else 0
                process = processes.start(folder, in_write)
                if not in_write:
                    time.sleep(rng.uniform(0, 0.5) * whole_s)
                    with suppress(ProcessLookupError):  # it was quicker
                        os.kill(process, signal.SIGKILL)
                code = processes.exit_code()
                if code == 0:
                    break
                assert code == -signal.SIGKILL, "it failed by itself"
                jobs = TrainingService(folder / "jobs").jobs()
                lost += [len(job.losses()) - job.snapshot().step for job in jobs] or [0]
                assert all(job.snapshot().state in UNHARMED for job in jobs)
            (job,) = TrainingService(folder / "jobs").jobs()
            assert job.snapshot().state is JobState.FINISHED
            assert job.losses() == job.folder.losses() and len(job.losses()) == CONFIG.steps
            for concept in (folder / "concepts").glob("*.safetensors"):
                assert tensors(concept) == tensors(whole)
            assert (folder / "concepts" / "cat.safetensors").is_file()
    assert max(lost) <= 2  # a checkpoint is written after every second step
    print(f"{len(lost)} kills in {lives} trainings of {whole_s:.1f} s; lost: {max(lost)} steps")


# Faults of the disk, with a training that counts


def counting(steps: int, fail_at: int = 0) -> Callable[..., Concept]:
    """Learns the number of steps; checkpoints after every second one."""

    def train(
        checkpoint: Checkpoint | None,
        should_stop: Callable[[], bool],
        on_event: Callable[[Event], None],
    ) -> Concept:
        value = torch.zeros(64, 768) if checkpoint is None else checkpoint.parameters[0].clone()
        losses = list(checkpoint.losses) if checkpoint else []

        def learnt() -> Concept:
            layer = "output_blocks.3.1.transformer_blocks.0.attn2.to_k"
            return Concept(FAMILIES["sd15"], {layer: DenseDelta(value.clone())})

        while len(losses) < steps and not should_stop():
            if fail_at == len(losses) + 1:
                raise RuntimeError("no luck")
            value += 1
            losses.append(float(value[0, 0]))
            on_event(StepDone(len(losses), losses[-1]))
            if len(losses) % 3 == 0:
                on_event(PreviewDrawn(len(losses), torch.rand(8, 8, 3)))
            if len(losses) % 2 == 0:
                on_event(CheckpointDue(Checkpoint(tuple(losses), (value,), ({},)), learnt()))
        return learnt()

    return train


class Counting:
    """A folder of jobs, and a process after the other that works on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, steps: int = 8, fail_at: int = 0) -> Job:
        service = TrainingService(self.folder / "jobs")
        work = Work(
            counting(steps, fail_at),
            lambda concept, own_files: write_new_concept(concept, self.folder / "concepts", "cat"),
        )
        job = service.submit("cat", steps, {}, work, fingerprint="the same")
        assert job.wait(LONG_S)
        return job

    def learnt(self, job: Job) -> float:
        from custom_diffusion.concept.file import read_concept

        path = job.snapshot().concept_file
        assert path is not None
        (delta,) = read_concept(path).deltas.values()
        return float(delta.dense()[0, 0])


@pytest.fixture
def count(tmp_path: Path) -> Counting:
    return Counting(tmp_path)


def test_a_failed_training_goes_on_from_its_last_checkpoint(count: Counting) -> None:
    failed = count.run(fail_at=6)
    assert failed.snapshot().state is JobState.FAILED
    assert (failed.snapshot().error, failed.snapshot().step) == ("no luck", 5)
    job = count.run()
    assert job.id == failed.id
    assert job.snapshot().state is JobState.FINISHED
    assert job.losses() == job.folder.losses() == [float(n) for n in range(1, 9)]
    assert count.learnt(job) == 8


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_of_a_damaged_checkpoint_the_one_before_is_used_and_that_is_said(
    count: Counting, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    failed = count.run(fail_at=8)
    newest = failed.folder.path / "checkpoints" / "000000006.safetensors"
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
    newest.write_bytes(
        content if damage == "flipped" else content[: len(content) // 2] if damage == "cut" else b""
    )
    job = count.run()
    assert count.learnt(job) == 8
    (note,) = job.snapshot().notes
    assert "000000006.safetensors" in note
    assert note.endswith("So the training resumes from step 4.")
    assert note in caplog.text
    assert job.losses() == [float(n) for n in range(1, 9)]


def test_when_all_checkpoints_are_damaged_it_begins_again_and_says_so(count: Counting) -> None:
    failed = count.run(fail_at=8)
    for path in (failed.folder.path / "checkpoints").iterdir():
        path.write_bytes(b"no checkpoint")
    job = count.run()
    assert count.learnt(job) == 8
    assert len(job.snapshot().notes) == 2
    assert all(note.endswith("resumes from step 0.") for note in job.snapshot().notes)


def test_a_torn_line_of_metrics_costs_nothing(count: Counting) -> None:
    failed = count.run(fail_at=6)
    metrics = failed.folder.path / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    assert count.run().folder.losses() == [float(n) for n in range(1, 9)]


def test_lost_metrics_come_back_from_the_checkpoint(count: Counting) -> None:
    failed = count.run(fail_at=6)
    (failed.folder.path / "metrics.jsonl").unlink()
    job = count.run()
    assert job.folder.losses() == [float(n) for n in range(1, 9)]
    lines = (job.folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["time"] is None for line in lines] == [True] * 4 + [False] * 4


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full, as far as this process can tell: writing more fails with an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 60, 150, 400, 2_000, 100_000, 150_000])
def test_a_full_disk_costs_no_checkpoint_and_no_job(count: Counting, size: int) -> None:
    """Of 0, 60 and 150 bytes is not even the description or a line; the concept has 98 kB, a
    checkpoint 197 kB.
    """
    with files_of_at_most(size):
        try:
            job = count.run()
        except CustomDiffusionError as error:
            assert "could not be" in str(error)
        else:
            assert job.snapshot().state is JobState.FAILED
            assert "full" in job.snapshot().error or "large" in job.snapshot().error
    job = count.run()
    assert job.snapshot().state is JobState.FINISHED
    assert count.learnt(job) == 8
    assert not list(count.folder.rglob("*.tmp"))


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without hard links."""

    def link(*_: object) -> None:
        raise PermissionError("no hard links")

    monkeypatch.setattr(os, "link", link)


def test_more_steps_on_a_full_disk_leave_no_half_of_a_job(count: Counting, no_links: None) -> None:
    shorter = count.run()
    with (
        files_of_at_most(100_000),
        pytest.raises(CustomDiffusionError, match="could not be written"),
    ):
        count.run(steps=12)
    assert [path.name for path in (count.folder / "jobs").iterdir()] == [shorter.id]
    assert count.learnt(count.run(steps=12)) == 12


def test_more_steps_take_over_the_checkpoints_without_reading_them(count: Counting) -> None:
    """Not a byte: with links a checkpoint of gigabytes costs neither time nor memory nor disk."""
    shorter = count.run()
    with files_of_at_most(100_000):  # a checkpoint is larger
        failed = count.run(steps=12)
    assert failed.snapshot().state is JobState.FAILED
    ours, theirs = (
        {path.name: path.stat() for path in (job.folder.path / "checkpoints").iterdir()}
        for job in (failed, shorter)
    )
    assert {name: of.st_ino for name, of in ours.items()} == {
        name: of.st_ino for name, of in theirs.items()
    }
    assert count.learnt(count.run(steps=12)) == 12
    assert {path.name: path.stat().st_ino for path in _checkpoints(shorter)} == {
        name: of.st_ino for name, of in theirs.items()
    }
    read_checkpoint(_checkpoints(shorter)[-1])


def test_without_links_the_checkpoints_are_copied(count: Counting, no_links: None) -> None:
    count.run()
    assert count.learnt(count.run(steps=12)) == 12


def _checkpoints(job: Job) -> list[Path]:
    return sorted((job.folder.path / "checkpoints").iterdir())


def test_a_damaged_checkpoint_of_the_shorter_training_costs_the_steps_since_the_one_before(
    count: Counting,
) -> None:
    shorter = count.run()
    newest = shorter.folder.path / "checkpoints" / "000000008.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    longer = count.run(steps=12)
    assert count.learnt(longer) == 12
    (note,) = longer.snapshot().notes
    assert "resumes from step 6" in note


def test_a_disk_that_fills_later_leaves_the_checkpoints_that_fitted(count: Counting) -> None:
    first = count.run(fail_at=5)
    assert first.folder.newest_step() == 4
    with files_of_at_most(1000):
        failed = count.run()
        assert failed.snapshot().state is JobState.FAILED
    assert failed.folder.newest_step() == 4
    assert not list(count.folder.rglob("*.tmp"))
    assert count.learnt(count.run()) == 8


def test_a_concept_that_cannot_be_saved_is_saved_the_next_time_without_training(
    count: Counting,
) -> None:
    (count.folder / "concepts").write_text("not a folder")
    failed = count.run()
    assert failed.snapshot().state is JobState.FAILED
    assert "could not be written" in failed.snapshot().error
    (count.folder / "concepts").unlink()
    trained: list[int] = []
    service = TrainingService(count.folder / "jobs")

    def train(checkpoint: Checkpoint, *rest: object) -> Concept:
        trained.append(checkpoint.step)
        return counting(8)(checkpoint, *rest)

    save = lambda concept, own_files: write_new_concept(concept, count.folder / "concepts", "cat")  # noqa: E731
    job = service.submit("cat", 8, {}, Work(train, save), fingerprint="the same")
    assert job.wait(LONG_S)
    assert trained == [8]
    assert count.learnt(job) == 8


@contextmanager
def somebody_else(folder: Path) -> Iterator[None]:
    """This process may do only what others may in `folder`: root could write everywhere."""
    user = os.geteuid()
    if user == 0:
        folder.chmod(0o755)
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_without_permission_is_named() -> None:
    with TemporaryDirectory() as temporary:  # pytest's own folders are closed to others
        count = Counting(Path(temporary))
        failed = count.run(fail_at=5)
        failed.folder.path.chmod(0o555)
        with somebody_else(count.folder):
            job = count.run()
        assert job.snapshot().state is JobState.FAILED
        assert str(failed.folder.path) in job.snapshot().error
        failed.folder.path.chmod(0o755)
        assert count.learnt(count.run()) == 8


def test_pictures_that_are_deleted_while_a_training_runs_cost_nothing(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    def learn(delete: bool) -> Concept:
        folder = tmp_path / f"pictures {delete}"
        draw_pictures(folder)
        concept = replace(cat_concept(), images=load_folder(folder, "photo of a <new1> cat"))

        def on_event(event: Event) -> None:
            if delete:
                shutil.rmtree(folder, ignore_errors=True)

        with borrowed_models(pipeline) as models:
            bank = prepare(concept, CONFIG, models.latent_encoder, models.text_encoder)
            learnt = train(
                replace(CONFIG, steps=4),
                [concept],
                [bank],
                models.denoiser,
                models.text_encoder,
                on_event=on_event,
            )
        assert folder.exists() is not delete
        return learnt

    one, other = learn(delete=False), learn(delete=True)
    assert one.provenance["final_losses"] == other.provenance["final_losses"]
    assert all(torch.equal(one.deltas[k].dense(), other.deltas[k].dense()) for k in one.deltas)


def test_a_clock_that_jumps_changes_nothing_but_dates(
    count: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: jumps.uniform(-1e9, 4e9))
    failed = count.run(fail_at=6)
    job = count.run()
    assert job.id == failed.id
    assert job.losses() == [float(n) for n in range(1, 9)]
    assert job.snapshot().seconds_per_step >= 0  # type: ignore[operator]


def test_a_job_that_somebody_else_began_is_left_to_them(count: Counting) -> None:
    failed = count.run(fail_at=5)
    elsewhere = JobFolder(failed.folder.path)
    with elsewhere.locked(), pytest.raises(JobError, match="is running in another process"):
        count.run()
    assert count.learnt(count.run()) == 8


def test_a_thousand_readers_a_second_do_not_disturb(count: Counting) -> None:
    service = TrainingService(count.folder / "jobs")
    work = Work(
        counting(100),
        lambda concept, own_files: write_new_concept(concept, count.folder / "concepts", "cat"),
    )
    job = service.submit("cat", 100, {}, work)
    started, reads = time.monotonic(), 0
    while not job.snapshot().ended:
        assert job.snapshot().step <= 100
        reads += 2
    assert reads / (time.monotonic() - started) > 1000
    assert job.losses() == [float(n) for n in range(1, 101)]
