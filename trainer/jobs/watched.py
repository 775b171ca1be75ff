"""A training job as everybody sees it: where it is, what it has learnt, whether it has ended.

Another process may run it, or have left it: then its folder is what is known.
"""

from __future__ import annotations

import threading
from dataclasses import replace

from .folder import JobFolder
from .records import Outcome
from .snapshot import ACTIVE, JobState, Pace, Snapshot, snapshot_on_disk
from .transitions import Wish
from .work import Work


class WatchedJob:
    """What is known of a job; `Job` runs it."""

    def __init__(self, folder: JobFolder, work: Work | None = None) -> None:
        """Without `work` the job is one that another process left, or runs."""
        self.folder = folder
        self._work: Work | None = None
        self._lock = threading.RLock()
        self._wish: Wish | None = None
        """What a job that waits for its turn, or is at work, is to do"""
        self._left_for: Wish | None = None
        """Why the loop is left; it is not entered again in this turn"""
        self._losses: list[float] = []
        self._validation: dict[int, float] = {}
        self._ended = threading.Event()
        self._pace = Pace()
        self._snapshot: Snapshot
        self._outcome: Outcome | None = None
        """As the folder had it when it was looked at last"""
        self._look()
        if work:
            folder.claim()
            self._work = work
            self._snapshot = replace(self._snapshot, state=JobState.QUEUED)

    @property
    def id(self) -> str:
        return self.folder.id

    @property
    def is_loaded(self) -> bool:
        """Whether it can go on in this process: its models are here, or can be made again."""
        with self._lock:
            return self._work is not None and self._work.has_models()

    @property
    def runs_here(self) -> bool:
        with self._lock:
            return self._work is not None and self._snapshot.state in ACTIVE

    def snapshot(self) -> Snapshot:
        with self._lock:
            if self._may_be_elsewhere():
                self._look()
            return self._snapshot

    def _may_be_elsewhere(self) -> bool:
        """Whether another process may have changed what is known of the job."""
        if self.runs_here or not self.folder.path.is_dir():
            return False
        if self.folder.outcome() is not self._outcome:
            return True
        if self._work:  # paused: who queues it first has it
            return self.folder.is_claimed() or self.folder.is_locked()
        return not self._snapshot.ended

    def _look(self) -> None:
        """Knows of the job what its folder says."""
        self._outcome, self._snapshot = self.folder.outcome(), snapshot_on_disk(self.folder)
        self._work, self._wish, self._losses, self._validation = None, None, [], {}
        if self._snapshot.ended:
            self._ended.set()
        else:
            self._ended.clear()

    def losses(self, after_step: int = 0) -> list[float]:
        """Of the steps done after that one."""
        with self._lock:
            if self._work is None and not self._losses:
                return self.folder.losses()[after_step:]
            return self._losses[after_step:]

    def validation(self, after_step: int = 0) -> dict[int, float]:
        """Losses on pictures that are kept back, by step, of those after that one."""
        with self._lock:
            here = self._work is not None or self._losses
            known = self._validation if here else self.folder.validation()
            return {step: loss for step, loss in known.items() if step > after_step}

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits for the end; whether it was reached."""
        return self._ended.wait(timeout_s)
