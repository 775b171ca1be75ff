"""A sheet of a job's steps against strengths and seeds: what it shows, its pictures as they come,
and the concepts that they were drawn with, so that a step can be taken after the run dropped it.

    comparisons/1/plan.json
                  concepts/000000050.safetensors
                  pictures/000000000.png

A new sheet has the next number; the one before goes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ...concept.atomic import write_atomically, write_text_atomically
from ...concept.concept import Concept
from ...concept.errors import ConceptFileError, JobError, UnknownJobError
from ...concept.file import read_concept, write_concept, write_new_concept
from ...concept.naming import THUMBNAIL
from ...concept.regular_files import read_regular
from .folder import JobFolder
from .records import ComparisonPlan
from .step_files import step_file, step_files

_FOLDER, _PLAN, _CONCEPTS, _PICTURES = "comparisons", "plan.json", "concepts", "pictures"
_MOST_BYTES = 2**20


class Comparison:
    """The sheet of a job that was begun last."""

    def __init__(self, job: JobFolder, path: Path, plan: ComparisonPlan) -> None:
        self._job, self._path, self.plan = job, path, plan

    @staticmethod
    def begin(job: JobFolder, plan: ComparisonPlan) -> Comparison:
        """A new one; the one before is removed. Raises JobError where the job is gone."""
        before = _numbers(job)
        path = job.path / _FOLDER / str(max(before, default=0) + 1)
        comparison = Comparison(job, path, plan)
        text = json.dumps(plan.as_json(), ensure_ascii=False)
        comparison._write(lambda: write_text_atomically(path / _PLAN, text))
        for number in before:
            shutil.rmtree(job.path / _FOLDER / str(number), ignore_errors=True)
        return comparison

    @staticmethod
    def newest(job: JobFolder) -> Comparison | None:
        """None where none was begun, or it cannot be read."""
        for number in sorted(_numbers(job), reverse=True):
            path = job.path / _FOLDER / str(number)
            try:
                content = read_regular(path / _PLAN, _MOST_BYTES)
                return Comparison(job, path, ComparisonPlan.parse(content))
            except (OSError, ValueError):  # half of one: the one before may be whole
                continue
        return None

    def write_concept(self, concept: Concept, step: int) -> None:
        """What the pictures of a step are drawn with. Raises JobError where the job is gone."""
        path = step_file(self._path / _CONCEPTS, step)
        self._write(lambda: write_concept(concept, path))

    def concept(self, step: int) -> Concept:
        """Raises JobError where the job is gone."""
        try:
            return read_concept(step_file(self._path / _CONCEPTS, step))
        except ConceptFileError:
            self._check_there()
            raise

    def write_picture(self, number: int, picture: Image.Image) -> None:
        """Raises JobError where the job is gone."""
        path = step_file(self._path / _PICTURES, number, ".png")
        self._write(
            lambda: write_atomically(path, lambda temporary: picture.save(temporary, "PNG"))
        )

    def pictures(self) -> dict[int, Path]:
        """Those that are drawn, by number."""
        files = step_files(self._path / _PICTURES, ".png")
        return {int(file.stem): file for file in files if int(file.stem) < len(self.plan)}

    def take(self, number: int, folder: Path, name: str) -> Path:
        """Writes the concept that a picture was drawn with, and the picture beside it, into a
        folder, under a name that is free. Raises UnknownJobError where there is no such picture.
        """
        picture = self.pictures().get(number)
        if picture is None:
            raise UnknownJobError(
                f"The comparison of {self._job.id} has no picture {number}: it is of "
                f"{len(self.plan)}, counted from 0, and they come one after the other."
            )
        path = write_new_concept(self.concept(self.plan.step_of(number)), folder, name)
        thumbnail = path.with_suffix(THUMBNAIL)
        write_atomically(thumbnail, lambda temporary: shutil.copyfile(picture, temporary))
        return path

    def _write(self, write: Callable[[], object]) -> None:
        """Nothing is left of it where the job is deleted meanwhile."""
        self._check_there()
        write()
        try:
            self._check_there()
        except JobError:
            shutil.rmtree(self._job.path, ignore_errors=True)  # made again by the writing
            raise

    def _check_there(self) -> None:
        if not self._job.is_there():
            raise JobError(
                f"The training job {self._job.id} was deleted while its steps were compared, so "
                f"there is nothing to draw them from. Train again, or compare another job."
            )


def _numbers(job: JobFolder) -> list[int]:
    folders = (job.path / _FOLDER).glob("*")
    return [int(path.name) for path in folders if path.name.isascii() and path.name.isdigit()]
