"""Training jobs: one thread that trains, one service that owns the jobs, snapshots for everyone
else.

    queued → preparing → running → finished | stopped | failed

Stopping saves what was learnt. Readers never see a job itself, only frozen snapshots of it.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from ..concept.atomic import write_text_atomically
from ..concept.concept import Concept
from ..concept.errors import ConfigError
from ..concept.file import safe_file_name
from .loop import Event, MemoryShort, PreviewDrawn, StepDone

log = logging.getLogger("custom_diffusion")


class JobState(str, Enum):
    QUEUED = "queued"
    PREPARING = "preparing"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class Snapshot:
    """A job as it was at one moment."""

    id: str
    name: str
    state: JobState
    step: int
    steps: int
    losses: tuple[float, ...] = ()
    preview_hwc: Tensor | None = None
    preview_step: int = 0
    error: str = ""
    concept_file: Path | None = None

    @property
    def ended(self) -> bool:
        return self.state in (JobState.FINISHED, JobState.STOPPED, JobState.FAILED)


Train = Callable[[Callable[[], bool], Callable[[Event], None]], Concept]
"""(should_stop, on_event) → what was learnt; called on the trainer thread"""


class Job:
    """One training run. Made by `TrainingService.submit`."""

    def __init__(
        self, folder: Path, name: str, steps: int, train: Train, save: Callable[[Concept], Path]
    ):
        self.folder = folder
        self._train: Train | None = train
        self._save = save
        self._lock = threading.Lock()
        self._snapshot = Snapshot(folder.name, name, JobState.QUEUED, 0, steps)
        self._losses: list[float] = []
        self._stop = threading.Event()
        self._ended = threading.Event()

    @property
    def id(self) -> str:
        return self.folder.name

    def snapshot(self) -> Snapshot:
        with self._lock:
            return replace(self._snapshot, losses=tuple(self._losses))

    def stop(self) -> None:
        """Asks the job to save what was learnt and end; returns at once."""
        with self._lock:
            self._stop.set()
            if self._snapshot.state is JobState.QUEUED:
                self._snapshot = replace(self._snapshot, state=JobState.STOPPED)
                self._train = None
                self._ended.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits for the end; whether it was reached."""
        return self._ended.wait(timeout_s)

    def run(self) -> None:
        """Trains and saves, on the calling thread; a failure ends in the snapshot and the log."""
        try:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as metrics:
                self._run(metrics)
        except Exception as error:
            log.exception("training job %s failed", self.id)
            self._update(state=JobState.FAILED, error=str(error) or type(error).__name__)
        finally:
            if not self.snapshot().ended:  # not even an Exception: the interpreter is going down
                self._update(state=JobState.FAILED, error="the trainer thread was ended")
            self._ended.set()

    def _run(self, metrics: TextIO) -> None:
        with self._lock:
            train, self._train = self._train, None  # the models it holds are free to go afterwards
            if train is None:  # stopped while it was queued
                return
            self._snapshot = replace(self._snapshot, state=JobState.PREPARING)
        concept = train(self._stop.is_set, lambda event: self._record(event, metrics))
        done = len(self._losses)
        if done == 0:  # stopped before the first step: there is nothing to save
            self._update(state=JobState.STOPPED)
            return
        path = self._save(concept)
        state = JobState.FINISHED if done == self._snapshot.steps else JobState.STOPPED
        self._update(state=state, concept_file=path)
        log.info("training job %s %s after %d steps: %s", self.id, state.value, done, path)

    def _record(self, event: Event, metrics: TextIO) -> None:
        if isinstance(event, StepDone):
            line = {"step": event.step, "loss": event.loss, "time": round(time.time(), 3)}
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            with self._lock:
                self._losses.append(event.loss)
                self._snapshot = replace(self._snapshot, state=JobState.RUNNING, step=event.step)
        elif isinstance(event, PreviewDrawn):
            self._update(preview_hwc=event.image_hwc, preview_step=event.step)
        elif isinstance(event, MemoryShort):
            log.warning("training job %s: %s", self.id, event.text())

    def _update(self, **changes: Any) -> None:
        with self._lock:
            self._snapshot = replace(self._snapshot, **changes)


class TrainingService:
    """Owns the jobs and the one thread that runs them, in the order they were submitted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._jobs: dict[str, Job] = {}
        self._queue: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(
        self,
        name: str,
        steps: int,
        settings: dict[str, Any],
        train: Train,
        save: Callable[[Concept], Path],
    ) -> Job:
        """Queues a job and returns it. `settings` are written to its folder, `train` runs later."""
        job = Job(self._new_folder(name), name, steps, train, save)
        text = json.dumps({"name": name, "steps": steps, **settings}, indent=2, ensure_ascii=False)
        write_text_atomically(job.folder / "job.json", text)
        with self._lock:
            self._jobs[job.id] = job
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="custom-diffusion-trainer", daemon=True
                )
                self._thread.start()
        self._queue.put(job)
        return job

    def job(self, job_id: str) -> Job:
        with self._lock:
            if job_id not in self._jobs:
                known = ", ".join(self._jobs) or "none"
                raise ConfigError(f"There is no training job {job_id!r}; known jobs: {known}.")
            return self._jobs[job_id]

    def snapshots(self) -> list[Snapshot]:
        with self._lock:
            jobs = list(self._jobs.values())
        return [job.snapshot() for job in jobs]

    def _work(self) -> None:
        while True:
            self._queue.get().run()

    def _new_folder(self, name: str) -> Path:
        stem = f"{datetime.now():%Y%m%d-%H%M%S}-{safe_file_name(name)}"
        for number in range(1, 1000):
            folder = self._folder / (stem if number == 1 else f"{stem}-{number}")
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                continue
            except OSError as error:
                raise ConfigError(
                    f"The job's folder {folder} could not be made ({error.strerror}). Make "
                    f"{self._folder} writable, or free some space there."
                ) from error
        raise ConfigError(f"There are too many job folders called {stem} in {self._folder}.")
