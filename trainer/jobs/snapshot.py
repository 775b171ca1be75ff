"""What readers see of a job: its state and figures as they were at one moment, here or on disk."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from torch import Tensor

from ...concept.errors import JobError
from .folder import JobFolder
from .records import MOST_NOTES, Outcome, text_that_fits

log = logging.getLogger("custom_diffusion")
_AVERAGED_STEPS = 20


class JobState(str, Enum):
    QUEUED = "queued"
    PREPARING = "preparing"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


class Doing(str, Enum):
    """What a job at work is busy with, where that is no step."""

    STEPS = ""
    COPYING = "copying"
    STARTING = "starting"
    DRAWING = "drawing"
    SAVING = "saving"


PREPARED = 0.1
"""The share of a training that is done before it is a job: its pictures are encoded"""

ENDED = (JobState.FINISHED, JobState.STOPPED, JobState.FAILED)
ACTIVE = (JobState.QUEUED, JobState.PREPARING, JobState.RUNNING)


@dataclass(frozen=True)
class Snapshot:
    """A job as it was at one moment."""

    id: str
    name: str
    state: JobState
    step: int
    steps: int
    doing: Doing = Doing.STEPS
    waiting: bool = False
    """It lets somebody else have the device first."""
    awaited: bool = False
    """Somebody waits here for its end."""
    loss: float | None = None
    """Of the last step"""
    seconds_per_step: float | None = None
    """Lately; without the time it waited"""
    drift: Mapping[str, float] = field(default_factory=dict)
    """How far the modifier tokens have moved: `trainer.learning.tokens.drift`"""
    preview_hwc: Tensor | None = None
    preview_step: int = 0
    notes: tuple[str, ...] = ()
    """What went wrong and was mended"""
    error: str = ""
    log: str = ""
    """Of a failed job: where it happened, for whoever looks for the fault"""
    concept_file: Path | None = None

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def progress(self) -> float:
        """How much is done, 0 to 1, of all that there is to do."""
        return PREPARED + (1 - PREPARED) * (self.step / self.steps if self.steps else 0)

    def as_json(self) -> dict[str, Any]:
        """Without the preview, because samples are files, and without the log."""
        loss = self.loss if self.loss is not None and math.isfinite(self.loss) else None
        return {
            "id": self.id,
            "name": self.name,
            "state": self.state.value,
            "step": self.step,
            "steps": self.steps,
            "progress": self.progress,
            "doing": self.doing.value,
            "waiting": self.waiting,
            "awaited": self.awaited,
            "loss": loss,
            "seconds_per_step": self.seconds_per_step,
            "drift": dict(self.drift),
            "preview_step": self.preview_step,
            "notes": self.notes,
            "error": self.error,
            "concept_file": self._listed_file(),
        }

    def _listed_file(self) -> str | None:
        """The concept's name where it is saved; what lies in the job's folder no list shows."""
        file = self.concept_file
        return file.name if file and self.id not in file.parts else None


class Pace:
    """Seconds per step, lately; the time that a job waits does not count."""

    def __init__(self) -> None:
        self._last_step_s = 0.0

    def begin(self) -> None:
        """From now on time counts."""
        self._last_step_s = time.monotonic()

    def step(self, before: float | None) -> float:
        """After a step, from what it was before."""
        now = time.monotonic()
        last, self._last_step_s = now - self._last_step_s, now
        return last if before is None else before + (last - before) / _AVERAGED_STEPS


def failure(error: BaseException, trace: str = "") -> dict[str, Any]:
    """What becomes of the snapshot of a job that failed."""
    try:
        text = str(error)
    except Exception:  # its own words raise another
        log.exception("an exception of a training has no words")
        text = ""
    return {"state": JobState.FAILED, "error": text or type(error).__name__, "log": trace}


def not_now(job_id: str, state: JobState) -> JobError:
    where = "" if state in ENDED else " in another process: do it there"
    return JobError(f"The training job {job_id} is {state.value}{where}.")


def outcome_of(snapshot: Snapshot) -> Outcome:
    """How a job ended, as its folder keeps it. Raises ValueError for what no file can hold."""
    return Outcome(
        state=snapshot.state.value,
        step=snapshot.step,
        concept_file=str(snapshot.concept_file or ""),
        error=text_that_fits(snapshot.error),
        log=text_that_fits(snapshot.log),
        notes=tuple(map(text_that_fits, snapshot.notes[-MOST_NOTES:])),
    )


def snapshot_on_disk(folder: JobFolder) -> Snapshot:
    """A job as its folder tells: running when somebody works on it, queued when somebody has it,
    else as it ended, or paused; and failed where the folder cannot tell.
    """
    description = folder.description
    if description.fault:
        return Snapshot(folder.id, folder.id, JobState.FAILED, 0, 0, error=description.fault)
    state = None
    if folder.is_locked():
        state = JobState.RUNNING
    elif folder.is_claimed():
        state = JobState.QUEUED
    outcome = None if state else folder.outcome()
    if outcome is None:
        state, step = state or JobState.PAUSED, folder.newest_step()
        return Snapshot(folder.id, description.name, state, step, description.steps)
    return Snapshot(
        id=folder.id,
        name=description.name,
        state=JobState(outcome.state),
        step=folder.newest_step() if outcome.step is None else outcome.step,
        steps=description.steps,
        notes=outcome.notes,
        error=outcome.error,
        log=outcome.log,
        concept_file=Path(outcome.concept_file) if outcome.concept_file else None,
    )
