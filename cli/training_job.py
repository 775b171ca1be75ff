"""Trainings that are jobs: `custom-diffusion train --jobs FOLDER`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from ..concept.concept import Concept
from ..concept.errors import TrainingError
from ..trainer.checkpoint import Checkpoint
from ..trainer.config import TrainConfig
from ..trainer.events import Event
from ..trainer.jobs.folder import JobFolder
from ..trainer.jobs.own_files import OwnFiles
from ..trainer.jobs.service import TrainingService
from ..trainer.jobs.settings import JobSettings
from ..trainer.jobs.snapshot import JobState
from ..trainer.jobs.work import Work
from .output import check_new, stop_on_interrupt

_POLL_S = 0.1


def run_as_job(
    folder: Path,
    outputs: Sequence[Path],
    config: TrainConfig,
    fingerprint: str,
    run: Callable[..., Concept],
    save: Callable[[Concept, OwnFiles], Path],
    settings: JobSettings,
) -> None:
    """Trains in a folder of its own: killed or interrupted, the same command goes on from there.

    `run` is `trainer.loop.train`, but for the arguments that a job gives; the job is called as the
    first of `outputs`, which `save` writes. Raises ConceptFileError where one of them exists and is
    not what this job has saved before.
    """

    def work(
        checkpoint: Checkpoint | None,
        should_stop: Callable[[], bool],
        on_event: Callable[[Event], None],
    ) -> Concept:
        return run(
            checkpoint=checkpoint,
            checkpoint_every_steps=settings.checkpoint_every_steps,
            should_stop=should_stop,
            on_event=on_event,
        )

    service = TrainingService(folder)
    before = service.find(fingerprint, config.steps, config.ends_early)
    for output in outputs:
        if not (before and before.folder.own_files.holds(output)):
            check_new(output)
    name = outputs[0].stem
    description = {"config": config.as_json(), "keep_best": settings.keep_best}
    job = service.submit(
        name, config.steps, description, Work(work, save), fingerprint, config.ends_early
    )
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
            f"paused at step {snapshot.step} of {snapshot.steps}: the same command resumes from "
            f"there"
        )
    elif snapshot.concept_file:
        print(f"the job {job.id} is {snapshot.state.value}: {snapshot.concept_file}")


def is_of_a_job(folder: Path, output: Path) -> bool:
    """Whether a job in the folder has saved what is there."""
    return any(job.own_files.holds(output) for job in JobFolder.all_in(folder))
