"""Trainings that are jobs: `custom-diffusion train --jobs FOLDER`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from ..concept.concept import Concept
from ..concept.errors import TrainingError
from ..trainer.checkpoint import Checkpoint
from ..trainer.config import TrainConfig
from ..trainer.events import Event
from ..trainer.jobs.service import TrainingService
from ..trainer.jobs.snapshot import JobState
from ..trainer.jobs.work import Work
from .output import stop_on_interrupt

CHECKPOINT_EVERY_STEPS = 50
_POLL_S = 0.1


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
