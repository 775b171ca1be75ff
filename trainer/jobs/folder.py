"""The folder of a training job: everything about it that outlives the process.

    job.json         what it was asked to do; written once
    metrics.jsonl    one line a step
    checkpoints/     000000050.safetensors: what it goes on from
    concepts/        000000050.safetensors: what it had learnt by then
    samples/         000000050.png
    comparisons/     1: the sheet of its steps that was drawn last (`comparison.py`)
    outcome.json     how it ended; absent until then
    saved.json       the files that it has saved elsewhere, by their content

Every file is complete or absent, but for the last line of the metrics.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor

from ...concept.atomic import write_atomically, write_bytes_atomically, write_text_atomically
from ...concept.concept import Concept
from ...concept.errors import CheckpointError, ConfigError, CustomDiffusionError, JobError
from ...concept.file import write_concept
from ...concept.naming import THUMBNAIL, safe_file_name
from ...pictures.tensors import to_picture
from ..checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from .locks import CLAIM, LOCK, acquire, is_taken
from .metrics_log import MetricsLog, measured
from .own_files import OwnFiles
from .records import Description, Outcome, RecordFile, description_bytes, text_that_fits
from .step_files import remove, share_unless_gone, step_file, step_files
from .trash import TRASH, delete_folder

DESCRIPTION, METRICS, OUTCOME = "job.json", "metrics.jsonl", "outcome.json"
SAVED = "saved.json"
KEPT_CHECKPOINTS = 2
"""The newest, and one more in case that it is damaged"""
SAMPLE_EDGE = 512


class JobFolder:
    """One job's folder, which exists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = MetricsLog(path / METRICS, lambda: self.description.steps)
        self._claim: FileLock | None = None
        self._description = RecordFile(path / DESCRIPTION, Description.parse, self._unusable)
        self._outcome = RecordFile(path / OUTCOME, Outcome.parse, self._unknown_outcome)
        self.own_files = OwnFiles(path / SAVED)

    @staticmethod
    def create(jobs: Path, name: str, description: dict[str, Any]) -> JobFolder:
        """A new folder in `jobs`. Raises ConfigError where it cannot be made, or `description` is
        nothing that can be read again.
        """
        content = description_bytes({"name": name, "created": time.time(), **description})
        stem = f"{datetime.now():%Y%m%d-%H%M%S}-{safe_file_name(name)}"
        for number in range(1, 1000):
            path = jobs / (stem if number == 1 else f"{stem}-{number}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise ConfigError(
                    f"The job's folder {path} could not be made ({error.strerror}). Make "
                    f"{jobs} writable, or free some space there."
                ) from error
            try:
                write_bytes_atomically(path / DESCRIPTION, content)
            except CustomDiffusionError:
                path.rmdir()
                raise
            return JobFolder(path)
        raise ConfigError(f"There are too many job folders called {stem} in {jobs}.")

    @staticmethod
    def all_in(jobs: Path) -> list[JobFolder]:
        """Every folder in `jobs` with a description, readable or not, in the order of their names.

        Raises JobError when `jobs` cannot be looked at.
        """
        try:
            paths = sorted(jobs.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise JobError(
                f"The folder of jobs {jobs} cannot be read ({error.strerror}). Give yourself "
                f"permission to."
            ) from error
        jobs_there = (path for path in paths if not path.name.startswith(TRASH))
        return [JobFolder(path) for path in jobs_there if os.path.lexists(path / DESCRIPTION)]

    @property
    def id(self) -> str:
        """The folder's name; bytes of it that are no text are written in ASCII."""
        return os.fsencode(self.path.name).decode(errors="backslashreplace")

    def is_there(self) -> bool:
        """Whether it is a job's still: it may have been deleted since."""
        return os.path.lexists(self.path / DESCRIPTION)

    @property
    def description(self) -> Description:
        """What job.json says, or in its `fault` why it says nothing."""
        return self._description.read() or self._unusable("it is not there")

    def _unusable(self, reason: str) -> Description:
        path = self.path / DESCRIPTION
        fault = f"{path} describes no training job ({reason}). Mend the file, or delete the job."
        return Description(name=self.id, steps=0, fault=text_that_fits(fault))

    # Whose it is

    def claim(self) -> None:
        """Until `release` no other process queues, runs or deletes the job.

        Raises JobError when one has it.
        """
        if self._claim:
            return
        with suppress(OSError):  # a folder that nobody can write: `locked` says so at its turn
            self._claim = self._acquire(CLAIM)

    def release(self) -> None:
        if self._claim:
            self._claim.release()
        self._claim = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While the context lasts no other process works on the job. Raises JobError when one does,
        and when the folder cannot be written.
        """
        try:
            lock = self._acquire(LOCK)
        except OSError as error:
            raise JobError(
                f"The job's folder {self.path} cannot be written ({error.strerror}). Give yourself "
                f"permission to, or train again with another name."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def is_locked(self) -> bool:
        """Whether somebody works on the job at this moment."""
        return is_taken(self.path, LOCK)

    def is_claimed(self) -> bool:
        """Whether a process has the job in its queue, or works on it."""
        return is_taken(self.path, CLAIM)

    def _acquire(self, name: str) -> FileLock:
        try:
            return acquire(self.path, name)
        except Timeout as error:
            raise self._is_elsewhere() from error

    def _is_elsewhere(self) -> JobError:
        what = "is at work" if self.is_locked() else "waits for its turn"
        return JobError(
            f"The training job {self.id} {what} in another process. Wait for its end there, or "
            f"stop or pause it there."
        )

    # Metrics

    def losses(self) -> list[float]:
        """Of every step that is on disk."""
        return [line.loss for line in self.metrics.lines()]

    def validation(self) -> dict[int, float]:
        """Losses on pictures that are kept back, by step, as far as they are on disk."""
        return measured(self.metrics.lines())

    # Checkpoints, and what was learnt by then

    def write_checkpoint(self, checkpoint: Checkpoint) -> list[str]:
        """Keeps the newest `KEPT_CHECKPOINTS`; returns what `prune` does."""
        write_checkpoint(checkpoint, step_file(self.path / "checkpoints", checkpoint.step))
        return self.prune()

    def prune(self) -> list[str]:
        """Removes the checkpoints and concepts that are not to be kept; returns which could not be,
        and why. The next call tries them again.
        """
        keep = {self.newest_concept(), *self._best_first()[: self.description.keep_best]}
        surplus = self._step_files("checkpoints")[:-KEPT_CHECKPOINTS]
        surplus += [path for path in self._step_files("concepts") if path not in keep]
        return remove(surplus)

    def newest_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest that can be read, and what is wrong with those that are newer."""
        problems: list[str] = []
        for path in reversed(self._step_files("checkpoints")):
            try:
                return read_checkpoint(path), problems
            except CheckpointError as error:
                problems.append(str(error))
        return None, problems

    def newest_step(self, at_most: int | None = None) -> int:
        """The step of the newest checkpoint, by its name, of those before some step; 0 without."""
        steps = [int(path.stem) for path in self._step_files("checkpoints")]
        return max((step for step in steps if at_most is None or step <= at_most), default=0)

    def begin_where(self, other: JobFolder, at_most: int) -> None:
        """Takes over another job's checkpoints up to a step, but for those that it drops meanwhile.

        Raises ConceptFileError when the disk is full.
        """
        for source in other._step_files("checkpoints"):
            if int(source.stem) <= at_most:
                share_unless_gone(source, self.path / "checkpoints" / source.name)

    def write_concept(self, concept: Concept, step: int) -> list[str]:
        """Keeps the newest, and as many of the best as the description says: one, if nothing.
        Returns what `prune` does.
        """
        write_concept(concept, step_file(self.path / "concepts", step))
        return self.prune()

    def concepts(self) -> dict[int, Path]:
        """Step -> what had been learnt by then, in order; one may go while the run goes on."""
        return {int(path.stem): path for path in self._step_files("concepts")}

    def newest_concept(self) -> Path | None:
        return max(self._step_files("concepts"), default=None)

    def best_concept(self) -> Path | None:
        """The kept one of the lowest loss; which loss, `MetricsLog.loss_by` says."""
        return next(iter(self._best_first()), None)

    def _best_first(self) -> list[Path]:
        loss_by = self.metrics.loss_by()
        return sorted(self._step_files("concepts"), key=lambda path: loss_by(int(path.stem)))

    # Samples

    def write_sample(self, image_hwc: Tensor, step: int) -> None:
        """`image_hwc` (h, w, 3) in 0..1."""
        picture = sample_picture(image_hwc)
        path = step_file(self.path / "samples", step, ".png")
        write_atomically(path, lambda temporary: picture.save(temporary, "PNG"))

    def samples(self) -> dict[int, Path]:
        """Step → picture, in order."""
        return {int(path.stem): path for path in step_files(self.path / "samples", ".png")}

    def write_thumbnail(self, concept_file: Path) -> None:
        """The newest sample beside a concept, where there is one."""
        newest = max(self.samples().items(), default=None)
        if newest:
            target = concept_file.with_suffix(THUMBNAIL)
            write_atomically(target, lambda temporary: shutil.copyfile(newest[1], temporary))

    # The end

    def write_outcome(self, outcome: Outcome) -> None:
        write_text_atomically(self.path / OUTCOME, outcome.as_json())

    def outcome(self) -> Outcome | None:
        """How the job ended, the same object until that changes; None while it has not.

        A file that does not say it is a failure, with the reason as its error.
        """
        return self._outcome.read()

    def _unknown_outcome(self, reason: str) -> Outcome:
        path = self.path / OUTCOME
        why = (
            f"{path} does not say how the job ended ({reason}). Queue the graph again to resume "
            f"from the last checkpoint, or delete the job."
        )
        return Outcome("failed", error=text_that_fits(why))

    def clear_outcome(self) -> None:
        (self.path / OUTCOME).unlink(missing_ok=True)

    def delete(self) -> None:
        """Removes all of it; for whoever looks on it is gone at once.

        Raises JobError while a process has the job or a program one of its files, and then nothing
        is removed; and where files could not be removed, which the next deletion tries again.
        """
        delete_folder(self.path, self._check_free)

    def _check_free(self, path: Path) -> None:
        if is_taken(path, CLAIM) or is_taken(path, LOCK):
            raise self._is_elsewhere()

    def _step_files(self, kind: str) -> list[Path]:
        return step_files(self.path / kind)


def sample_picture(image_hwc: Tensor) -> Image.Image:
    """Samples (h, w, 3) in 0..1, enlarged to one height so that their latents can be seen."""
    picture = to_picture(image_hwc)
    return picture.resize(
        (SAMPLE_EDGE * picture.width // picture.height, SAMPLE_EDGE), Image.Resampling.BICUBIC
    )
