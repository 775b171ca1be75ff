"""What a job does when its turn comes: the few calls that its host gives it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from ...concept.concept import Concept
from ..checkpoint import Checkpoint
from ..events import Event
from .own_files import OwnFiles

Save = Callable[[Concept, OwnFiles], Path]
"""(what was learnt, the files that the job has saved before) → where it is saved"""


def never() -> bool:
    return False


def always() -> bool:
    return True


def _at_once(should_leave: Callable[[], bool]) -> AbstractContextManager[bool]:
    return nullcontext(True)


@dataclass(frozen=True)
class Work:
    """What a job does when its turn comes, all of it on the trainer thread."""

    train: Callable[[Checkpoint | None, Callable[[], bool], Callable[[Event], None]], Concept]
    """(checkpoint to go on from, should_stop, on_event) → what was learnt"""
    save: Save
    is_busy: Callable[[], bool] = never
    """Whether somebody else should have the device; asked between steps."""
    turn: Callable[[Callable[[], bool]], AbstractContextManager[bool]] = _at_once
    """While the context lasts the models are there, for `train` and `save`; afterwards the job
    holds none and has left the device. False where they were not waited for, because the job was
    to leave before. Raises ModelsGoneError where there is nothing to make them from any more.
    """
    has_models: Callable[[], bool] = always
    """Whether they could be there now"""
