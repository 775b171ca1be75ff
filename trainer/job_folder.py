"""The folder of a training job: everything about it that outlives the process.

    job.json         what it was asked to do; written once
    metrics.jsonl    one line a step
    checkpoints/     000000050.safetensors: what it goes on from
    concepts/        000000050.safetensors: what it had learnt by then
    samples/         000000050.png
    outcome.json     how it ended; absent until then

Every file is complete or absent, but for the last line of the metrics.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor

from ..concept.atomic import write_atomically, write_bytes_atomically, write_text_atomically
from ..concept.card import THUMBNAIL
from ..concept.concept import Concept
from ..concept.errors import CheckpointError, ConfigError, CustomDiffusionError, JobError
from ..concept.file import safe_file_name, write_concept
from .checkpoint import Checkpoint, read_checkpoint, write_checkpoint

DESCRIPTION, METRICS, OUTCOME, LOCK = "job.json", "metrics.jsonl", "outcome.json", ".lock"
KEPT_CHECKPOINTS = 2
"""The newest, and one more in case that it is damaged"""
SAMPLE_EDGE = 512


class JobFolder:
    """One job's folder, which exists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics: TextIO | None = None

    @staticmethod
    def create(jobs: Path, name: str, description: dict[str, Any]) -> JobFolder:
        """A new folder in `jobs`. Raises ConfigError where it cannot be made."""
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
            folder = JobFolder(path)
            described = {"name": name, "created": time.time(), **description}
            text = json.dumps(described, indent=2, ensure_ascii=False)
            try:
                write_text_atomically(path / DESCRIPTION, text)
            except CustomDiffusionError:
                path.rmdir()
                raise
            return folder
        raise ConfigError(f"There are too many job folders called {stem} in {jobs}.")

    @staticmethod
    def all_in(jobs: Path) -> list[JobFolder]:
        """Every job folder in `jobs`, the oldest first."""
        return [JobFolder(path.parent) for path in sorted(jobs.glob(f"*/{DESCRIPTION}"))]

    @property
    def id(self) -> str:
        return self.path.name

    @cached_property
    def description(self) -> dict[str, Any]:
        """Raises JobError when job.json is not what `create` wrote."""
        try:
            description = json.loads((self.path / DESCRIPTION).read_text(encoding="utf-8"))
            if isinstance(description["name"], str) and isinstance(description["steps"], int):
                return description  # type: ignore[no-any-return]
            reason: object = "its name or steps are no such thing"
        except (OSError, ValueError, LookupError, TypeError) as error:
            reason = error
        raise JobError(f"{self.path / DESCRIPTION} describes no training job ({reason}).")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While the context lasts no other process works on the job. Raises JobError when one does.

        The system frees the lock of a process that dies.
        """
        lock = FileLock(self.path / LOCK, timeout=1)  # whoever only asks has it for a moment
        try:
            lock.acquire()
        except Timeout as error:
            raise JobError(
                f"The training job {self.id} runs in another process. Wait for its end there, or "
                f"stop it there."
            ) from error
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
        try:
            with FileLock(self.path / LOCK, timeout=0):
                return False
        except Timeout:
            return True
        except OSError:  # a folder that nobody can write
            return False

    # Metrics

    @contextmanager
    def metrics_after(self, losses: Sequence[float]) -> Iterator[None]:
        """While the context lasts `add_metrics` can be called. Before that the lines are as a run
        had them that has come so far: later ones are dropped, lost ones made again.
        """
        lines = list(islice(self._lines(), len(losses)))
        for step in range(len(lines), len(losses)):
            lines.append({"step": step + 1, "loss": losses[step], "time": None})
        write_text_atomically(
            self.path / METRICS, "".join(json.dumps(line) + "\n" for line in lines)
        )
        with open(self.path / METRICS, "a", encoding="utf-8") as self._metrics:
            yield
        self._metrics = None

    def add_metrics(self, step: int, loss: float) -> None:
        assert self._metrics is not None, "metrics_after comes first"
        line = {"step": step, "loss": loss, "time": round(time.time(), 3)}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    def losses(self) -> list[float]:
        """Of every step that is on disk."""
        return [line["loss"] for line in self._lines()]

    def _lines(self) -> Iterator[dict[str, Any]]:
        """Up to the first that is no metrics line: a killed process may have left half of one."""
        path = self.path / METRICS
        if not path.is_file():
            return
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, text in enumerate(file, start=1):
                try:
                    line = json.loads(text)
                    if line["step"] != number or not isinstance(line["loss"], float):
                        return
                except (ValueError, LookupError, TypeError):
                    return
                yield line

    # Checkpoints, and what was learnt by then

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Keeps the newest `KEPT_CHECKPOINTS`."""
        write_checkpoint(checkpoint, self._step_file("checkpoints", checkpoint.step))
        for path in self._step_files("checkpoints")[:-KEPT_CHECKPOINTS]:
            path.unlink()

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
                with suppress(FileNotFoundError):
                    content = source.read_bytes()
                    write_bytes_atomically(self.path / "checkpoints" / source.name, content)

    def write_concept(self, concept: Concept, step: int) -> None:
        """Keeps the newest, and as many of the best as the description says: one, if nothing."""
        write_concept(concept, self._step_file("concepts", step))
        keep = {self.newest_concept(), *self._best_first()[: self.description.get("keep_best", 1)]}
        for path in self._step_files("concepts"):
            if path not in keep:
                path.unlink()

    def newest_concept(self) -> Path | None:
        return max(self._step_files("concepts"), default=None)

    def best_concept(self) -> Path | None:
        """That before which the mean loss of up to 50 steps was lowest: single steps say little."""
        return next(iter(self._best_first()), None)

    def _best_first(self) -> list[Path]:
        losses = self.losses()

        def loss_before(path: Path) -> float:
            step = int(path.stem)
            return statistics.fmean(losses[max(step - 50, 0) : step] or [float("inf")])

        return sorted(self._step_files("concepts"), key=loss_before)

    # Samples

    def write_sample(self, image_hwc: Tensor, step: int) -> None:
        """`image_hwc` (h, w, 3) in 0..1."""
        picture = sample_picture(image_hwc)
        path = self.path / "samples" / f"{step:09}.png"
        write_atomically(path, lambda temporary: picture.save(temporary, "PNG"))

    def samples(self) -> dict[int, Path]:
        """Step → picture, in order."""
        return {int(path.stem): path for path in _numbered(self.path / "samples", ".png")}

    def write_thumbnail(self, concept_file: Path) -> None:
        """The newest sample beside a concept, where there is one."""
        newest = max(self.samples().items(), default=None)
        if newest:
            target = concept_file.with_suffix(THUMBNAIL)
            write_atomically(target, lambda temporary: shutil.copyfile(newest[1], temporary))

    # The end

    def write_outcome(self, outcome: dict[str, Any]) -> None:
        write_text_atomically(self.path / OUTCOME, json.dumps(outcome, ensure_ascii=False))

    def outcome(self) -> dict[str, Any] | None:
        """How the job ended; None while it has not, and where that cannot be read."""
        try:
            outcome = json.loads((self.path / OUTCOME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return outcome if isinstance(outcome, dict) else None

    def clear_outcome(self) -> None:
        (self.path / OUTCOME).unlink(missing_ok=True)

    def delete(self) -> None:
        """Removes all of it. Raises JobError where that is not allowed."""
        try:
            # First the description: what is left of an interrupted removal is no job any more.
            os.unlink(self.path / DESCRIPTION)
            shutil.rmtree(self.path)
        except OSError as error:
            raise JobError(
                f"The job's folder {self.path} could not be removed ({error.strerror}). Remove it "
                f"by hand."
            ) from error

    def _step_file(self, kind: str, step: int) -> Path:
        return self.path / kind / f"{step:09}.safetensors"

    def _step_files(self, kind: str) -> list[Path]:
        return _numbered(self.path / kind, ".safetensors")


def sample_picture(image_hwc: Tensor) -> Image.Image:
    """A sample (h, w, 3) in 0..1, enlarged so that its latents can be seen."""
    picture = Image.fromarray((image_hwc * 255).round().to(torch.uint8).numpy())
    return picture.resize((SAMPLE_EDGE, SAMPLE_EDGE), Image.Resampling.BICUBIC)


def _numbered(folder: Path, suffix: str) -> list[Path]:
    """Files named by their step, in order."""
    return sorted(path for path in folder.glob(f"*{suffix}") if path.stem.isdecimal())
