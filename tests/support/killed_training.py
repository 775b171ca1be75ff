"""A training job in processes of its own, to be killed. They share only files with the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from custom_diffusion.concept import atomic
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.file import write_new_concept
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.jobs.own_files import OwnFiles
from custom_diffusion.trainer.jobs.service import TrainingService
from custom_diffusion.trainer.jobs.work import Work
from diffusers import StableDiffusionPipeline

from .tiny_models import RESOLUTION, tiny_pipeline
from .tiny_training import train_cat

CONFIG = TrainConfig(
    steps=20, batch_size=2, learning_rate=1e-3, resolution=RESOLUTION, preview_every_steps=10
)


def run_job(pipeline: StableDiffusionPipeline, folder: Path, die_in_write: int = 0) -> None:
    """Runs the job to its end, from where an earlier process left it."""
    if die_in_write:
        _die_in_write(die_in_write)

    def save(result: Concept, own_files: OwnFiles) -> Path:
        return write_new_concept(result, folder / "concepts", "cat")

    service = TrainingService(folder / "jobs")
    job = service.submit(
        "cat",
        CONFIG.steps,
        {},
        Work(partial(train_cat, pipeline, CONFIG, 2), save),
        fingerprint="the same",
    )
    job.wait()
    if job.snapshot().error:
        os._exit(1)


def _die_in_write(number: int) -> None:
    """The file is there under its temporary name, half of it written, when the process dies."""
    flush_to_disk = atomic._flush_to_disk
    count = 0

    def flush(path: Path) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        flush_to_disk(path)

    atomic._flush_to_disk = flush


class Processes:
    """Starts processes of `run_job` in no time: forks of one that has everything imported."""

    def __enter__(self) -> Processes:
        tests = Path(__file__).parents[1]
        code = (
            f"import sys; sys.path.insert(0, {str(tests)!r}); import conftest; "
            f"from support.killed_training import serve; serve()"
        )
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(
            [sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True
        )
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait()

    def start(self, folder: Path, die_in_write: int = 0) -> int:
        """The process's number."""
        assert self._server.stdin
        print(die_in_write, folder, file=self._server.stdin, flush=True)
        return self._answer()

    def exit_code(self) -> int:
        """Waits for the end of the one that was started last; signals are negative."""
        return self._answer()

    def _answer(self) -> int:
        assert self._server.stdout
        return int(self._server.stdout.readline())


def serve() -> None:
    """The other end of `Processes`."""
    torch.set_num_threads(1)
    pipeline = tiny_pipeline()
    for line in sys.stdin:
        die_in_write, folder = line.rstrip("\n").split(" ", 1)
        child = os.fork()
        if not child:
            run_job(pipeline, Path(folder), int(die_in_write))
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
