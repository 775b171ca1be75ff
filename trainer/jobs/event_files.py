"""What the events of a run leave in the folder of its job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..events import CheckpointDue, Event, PreviewBegun, PreviewDrawn, StepDone, WordsMoved
from .folder import JobFolder
from .snapshot import Doing, JobState


def write_event(
    folder: JobFolder, event: Event, note: Callable[[list[str]], None]
) -> dict[str, Any]:
    """Writes what an event brings; returns what becomes of the job's snapshot.

    `note` is told which files could not be removed. Raises ConceptFileError when the disk is full.
    """
    if isinstance(event, StepDone):
        folder.metrics.add(event.step, event.loss, event.validation)
        learning = {"state": JobState.RUNNING, "doing": Doing.STEPS}
        return {**learning, "step": event.step, "loss": event.loss}
    if isinstance(event, WordsMoved):
        return {"drift": event.drift}
    if isinstance(event, PreviewBegun):
        return {"doing": Doing.DRAWING}
    if isinstance(event, PreviewDrawn):
        folder.write_sample(event.image_hwc, event.step)
        drawn = {"preview_hwc": event.image_hwc, "preview_step": event.step}
        return {**drawn, "doing": Doing.STEPS}
    if isinstance(event, CheckpointDue):
        note(folder.write_checkpoint(event.checkpoint))
        if event.concept:
            note(folder.write_concept(event.concept, event.checkpoint.step))
    return {}
