"""`custom-diffusion jobs`, and trainings that are jobs: `custom-diffusion train --jobs FOLDER`"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..concept.concept import Concept
from ..concept.errors import TrainingError
from ..trainer.checkpoint import Checkpoint
from ..trainer.config import TrainConfig
from ..trainer.events import Event
from ..trainer.jobs import Job, JobState, Work
from ..trainer.service import TrainingService
from .output import stop_on_interrupt

CHECKPOINT_EVERY_STEPS = 50
_POLL_S = 0.1


def add_to(commands: Any) -> None:
    jobs = commands.add_parser(
        "jobs",
        help="look at training jobs, and tidy them up",
        description="Jobs of ComfyUI lie in its folder output/custom_diffusion/jobs. One that runs "
        "in ComfyUI is paused and stopped there.",
    )
    actions = jobs.add_subparsers(required=True)
    for name, command, told in (
        ("list", list_command, "one line a job"),
        ("show", show_command, "a job with its settings, as JSON"),
        ("losses", losses_command, "of every step, one a line"),
        ("stop", stop_command, "end a paused job with what it learnt until its last checkpoint"),
        ("delete", delete_command, "remove a job; the concept that it saved stays"),
    ):
        action = actions.add_parser(name, help=told)
        action.add_argument("folder", type=Path)
        if name != "list":
            action.add_argument("id")
        action.set_defaults(command=command)


def list_command(options: argparse.Namespace) -> None:
    for job in TrainingService(options.folder).jobs():
        print(_line(job))


def show_command(options: argparse.Namespace) -> None:
    job = _job(options)
    shown = {**job.folder.description, **job.snapshot().as_json()}
    print(json.dumps(shown, indent=2, ensure_ascii=False))


def losses_command(options: argparse.Namespace) -> None:
    for loss in _job(options).losses():
        print(loss)


def stop_command(options: argparse.Namespace) -> None:
    job = _job(options)
    job.stop()
    print(_line(job))
    if job.snapshot().concept_file:
        print(job.snapshot().concept_file)


def delete_command(options: argparse.Namespace) -> None:
    TrainingService(options.folder).delete(options.id)


def run_as_job(
    folder: Path,
    name: str,
    config: TrainConfig,
    fingerprint: str,
    run: Callable[..., Concept],
    save: Callable[[Concept], Path],
) -> None:
    """Trains in a folder of its own: killed or interrupted, the same command goes on from there.

    `run` is `trainer.loop.train`, but for the arguments that a job gives.
    """

    def work(
        checkpoint: Checkpoint | None,
        should_stop: Callable[[], bool],
        on_event: Callable[[Event], None],
    ) -> Concept:
        return run(
            checkpoint=checkpoint,
            checkpoint_every_steps=CHECKPOINT_EVERY_STEPS,
            should_stop=should_stop,
            on_event=on_event,
        )

    service = TrainingService(folder)
    description = {"config": config.as_json()}
    job = service.submit(name, config.steps, description, Work(work, save), fingerprint)
    with (
        tqdm(total=config.steps, desc="training", unit="step") as bar,
        stop_on_interrupt() as interrupted,
    ):
        while not job.wait(_POLL_S) and job.snapshot().state is not JobState.PAUSED:
            if interrupted():
                service.pause(job.id)
            bar.update(job.snapshot().step - bar.n)
        bar.update(job.snapshot().step - bar.n)
    snapshot = job.snapshot()
    for note in snapshot.notes:
        print(note)
    if snapshot.state is JobState.FAILED:
        raise TrainingError(snapshot.error)
    if snapshot.state is JobState.PAUSED:
        print(
            f"paused at step {snapshot.step} of {snapshot.steps}: the same command goes on from "
            f"there"
        )
    elif snapshot.concept_file:
        print(f"the job {job.id} is {snapshot.state.value}: {snapshot.concept_file}")


def _job(options: argparse.Namespace) -> Job:
    return TrainingService(options.folder).job(options.id)


def _line(job: Job) -> str:
    snapshot = job.snapshot()
    told = f"{snapshot.state.value:9} {snapshot.step:6} of {snapshot.steps:6} steps"
    return f"{job.id}  {told}  {snapshot.error}".rstrip()
