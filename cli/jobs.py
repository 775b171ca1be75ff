"""`custom-diffusion jobs`: look at training jobs and steer them, in a folder or on a server."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..concept.errors import JobError
from ..concept.plain import json_text
from ..inspection.report import aligned
from ..trainer.jobs.differences import Difference, differences
from ..trainer.jobs.service import TrainingService
from .job_server import JobServer


def add_to(commands: Any) -> None:
    jobs = commands.add_parser(
        "jobs",
        help="look at training jobs and steer them",
        description="WHERE is the address of a running ComfyUI, such as http://127.0.0.1:8188, or "
        "a folder of jobs; ComfyUI's is output/custom_diffusion/jobs. To pause, resume or move a "
        "training that runs in ComfyUI, give the address.",
        example="jobs list http://127.0.0.1:8188",
    )
    actions = jobs.add_subparsers(required=True)
    for name, command, told in (
        ("list", list_command, "one line a job, and those that wait for their turn"),
        ("show", show_command, "a job with its settings, as JSON"),
        ("losses", losses_command, "the loss of every step, one a line"),
        ("differ", differ_command, "the settings in which two jobs differ"),
        ("pause", steer_command, "save progress and free the GPU"),
        ("resume", steer_command, "continue, before the jobs that wait"),
        ("stop", steer_command, "save what was learnt and end"),
        ("release", steer_command, "let the prompt go that waits for a job"),
        ("move", move_command, "give a waiting job another place in the queue, 0 for the next"),
        ("start", start_command, "queue the graph of a job again: it resumes where it was"),
        ("delete", delete_command, "remove a job; the concept that it saved stays"),
    ):
        action = actions.add_parser(name, help=told)
        action.add_argument("where", metavar="WHERE", type=str)
        if name != "list":
            action.add_argument("id", metavar="ID")
        if name == "differ":
            action.add_argument("other", metavar="OTHER_ID")
        if name == "move":
            action.add_argument("position", metavar="POSITION", type=int)
        action.set_defaults(command=partial(_with_jobs, command), action=name)


def _with_jobs(command: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> None:
    where = options.where
    options.where = JobServer(where) if "://" in where else JobFolders(Path(where))
    command(options)


def list_command(options: argparse.Namespace) -> None:
    jobs, queue = options.where.all()
    for job in jobs:
        print(_line(job))
    if queue:
        print(_one_line(f"waiting, the next one first: {', '.join(queue)}"))


def show_command(options: argparse.Namespace) -> None:
    print(json_text(options.where.show(options.id)))


def losses_command(options: argparse.Namespace) -> None:
    for loss in options.where.losses(options.id):
        print("nan" if loss is None else loss)


def differ_command(options: argparse.Namespace) -> None:
    found = options.where.differences(options.id, options.other)
    rows = [
        [_one_line(name), *("" if value is None else _one_line(value) for value in values)]
        for name, values in found.items()
    ]
    print("\n".join(aligned([["setting", options.id, options.other], *rows])))


def steer_command(options: argparse.Namespace) -> None:
    job = options.where.steer(options.id, options.action)
    print(_line(job))
    if job.get("concept_file"):
        print(_one_line(str(job["concept_file"])))


def move_command(options: argparse.Namespace) -> None:
    print("\n".join(map(_one_line, options.where.move(options.id, options.position))))


def start_command(options: argparse.Namespace) -> None:
    options.where.start(options.id)


def delete_command(options: argparse.Namespace) -> None:
    options.where.delete(options.id)


class JobFolders:
    """The jobs of a folder, by the same verbs as `JobServer` has."""

    def __init__(self, folder: Path) -> None:
        """Raises JobError when there is no such folder."""
        if not os.path.isdir(folder):
            raise JobError(
                f"There is no folder {folder}. Give a folder of jobs, or the address of a ComfyUI."
            )
        self._service = TrainingService(folder)

    def all(self) -> tuple[list[dict[str, Any]], list[str]]:
        return [job.snapshot().as_json() for job in self._service.jobs()], self._service.queued()

    def show(self, job_id: str) -> dict[str, Any]:
        job = self._service.job(job_id)
        return {**job.folder.description.content, **job.snapshot().as_json()}

    def losses(self, job_id: str) -> list[float]:
        return self._service.job(job_id).losses()

    def differences(self, job_id: str, other_id: str) -> dict[str, Difference]:
        one, other = (self._service.job(each).folder.description for each in (job_id, other_id))
        return differences(one, other)

    def steer(self, job_id: str, action: str) -> dict[str, Any]:
        getattr(self._service, action)(job_id)
        snapshot = self._service.job(job_id).snapshot()
        file = snapshot.concept_file
        return {**snapshot.as_json(), "concept_file": str(file) if file else None}

    def move(self, job_id: str, position: int) -> list[str]:
        self._service.reorder(job_id, position)
        return self._service.queued()

    def start(self, job_id: str) -> None:
        raise JobError(
            f"A folder of jobs holds no models, so {job_id} cannot start there. Give the address "
            f"of a ComfyUI instead of a folder, or repeat the command that began the job."
        )

    def delete(self, job_id: str) -> None:
        self._service.delete(job_id)


def _line(job: Mapping[str, Any]) -> str:
    told = f"{job['state']:9} {job['step']:6} of {job['steps']:6} steps"
    return _one_line(f"{job['id']}  {told}  {job['error']}")


def _one_line(text: str) -> str:
    """What a job's files say, which anybody may have written, without codes for the terminal."""
    return "".join(c if c.isprintable() else " " for c in text).rstrip()
