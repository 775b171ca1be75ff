"""Training jobs: one run each, in a folder of its own, to be paused, stopped and gone on with.

    queued → preparing → running ⇄ paused → finished | stopped | failed

Pausing writes a checkpoint and lets go of the model; going on reads it, in this process or, after
a restart, in another. Stopping saves what was learnt. Readers never see a job's own state, only
frozen snapshots of it.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...concept.errors import CustomDiffusionError, JobError, ModelsGoneError
from ..events import Event, Notice, StepDone
from .event_files import write_event
from .folder import JobFolder
from .snapshot import ACTIVE, ENDED, Doing, JobState, failure, not_now, outcome_of
from .transitions import AT_WORK, STANDING, Wish, next_state
from .waiters import Waiters
from .watched import WatchedJob
from .work import Work

log = logging.getLogger("custom_diffusion")
_POLL_S = 0.05


class Job(WatchedJob):
    """One training run. `TrainingService` makes jobs, runs them and passes wishes on to them."""

    def __init__(
        self,
        folder: JobFolder,
        work: Work | None = None,
        on_change: Callable[[Job], None] = lambda job: None,
    ) -> None:
        """Without `work` the job is one that another process left, or runs: it can be looked at."""
        super().__init__(folder, work)
        self._on_change = on_change
        self.waiters = Waiters(lambda: self._update(awaited=bool(self.waiters)))

    def pause(self) -> None:
        """Asks the job to write a checkpoint and let go of the device; returns at once.

        One that is to be stopped is stopped all the same. Raises JobError when it has ended, or is
        another process's.
        """
        with self._lock:
            state = self.snapshot().state
            if state is JobState.PAUSED:
                return
            if self._work is None:
                raise not_now(self.id, state)
            self._grant(Wish.PAUSE)

    def stop(self) -> None:
        """Asks the job to save what was learnt and end; returns at once.

        A job that waits for its turn ends without learning. Stopping a job that has ended changes
        nothing. Raises JobError when it is another process's.
        """
        with self._lock:
            state = self.snapshot().state
            if state in ENDED:
                return
            if self._work is None and state is not JobState.PAUSED:
                raise not_now(self.id, state)
            self._grant(Wish.STOP)

    def queue(self, work: Work | None = None) -> None:
        """Makes the job ready to be run (again): from where it is, with new work where given.

        Raises JobError when it is another process's, has no work any more, or is being stopped.
        """
        with self._lock:
            state = self.snapshot().state
            if state in ACTIVE:
                if self._work is None:
                    raise not_now(self.id, state)
                self._grant(Wish.GO_ON)
                return
            work = work or (self._work if self.is_loaded else None)
            if self.folder.description.fault:
                raise JobError(self.folder.description.fault)
            if work is None and state is JobState.FINISHED:
                raise not_now(self.id, state)
            if work is None:
                raise JobError(
                    f"The training job {self.id} is {state.value} at step "
                    f"{self._snapshot.step} of {self._snapshot.steps}, and its models are not "
                    f"loaded. Queue the graph again that it came from: it resumes from there."
                )
            self.folder.claim()
            self._work = work
            self._ended.clear()
            self._update(state=JobState.QUEUED, error="", log="", concept_file=None)

    def _grant(self, wish: Wish) -> None:
        """At once where nobody works on the job; else the wish stands until the loop is left."""
        state = self._snapshot.state
        if state in AT_WORK:
            if (self._wish, wish) not in STANDING:
                raise JobError(
                    f"The training job {self.id} is being stopped. Wait for its end, then queue "
                    f"its graph again."
                )
            self._wish = STANDING[self._wish, wish]
            return
        wish = STANDING.get((self._wish, wish)) or wish
        after = next_state(state, wish, self._can_be_saved)
        if after is not JobState.PAUSED:
            self.folder.claim()
        if after is JobState.STOPPED:
            self._end_at_once(**self._stopped_without_models())
        else:
            self._wish = Wish.STOP if wish is Wish.STOP else None
            self._update(state=after)

    @property
    def _can_be_saved(self) -> bool:
        return self._snapshot.step > 0 and self.is_loaded

    def delete(self) -> None:
        """Removes the job's folder, and ends it for those who wait.

        Raises JobError while it is at work, here or in another process, and where something is left
        of the folder; it is no job any more when its path is free.
        """
        with self._lock:
            if self.runs_here:
                raise JobError(f"The training job {self.id} is at work. Stop or pause it first.")
            try:
                self.folder.delete()
            finally:
                if not self.folder.path.exists():
                    self.forget()

    def forget(self) -> None:
        """Ends a job whose folder is gone, for those who wait."""
        with self._lock:
            if not self._snapshot.ended:
                self._become({"state": JobState.STOPPED})

    def run(self) -> None:
        """Trains and saves, on the calling thread; a failure ends in the snapshot and the log."""
        with self._lock:
            work, self._left_for = self._work, None
            if work is None or self._snapshot.state is not JobState.QUEUED:
                return
        end: dict[str, Any] = {}
        try:
            self._update(state=JobState.PREPARING, doing=Doing.COPYING)
            with self.folder.locked():
                end = self._run(work)
                self._write_outcome(end)
        except JobError as error:  # the folder is another process's, or cannot be written
            log.error("training job %s: %s", self.id, error)
            end = failure(error)
        except BaseException as error:  # a lock of an odd file system, whoever looks on
            log.exception("training job %s failed", self.id)
            end = {**end, **failure(error, traceback.format_exc())}
        finally:
            self._become(end)  # now that the folder is free for others

    def _run(self, work: Work) -> dict[str, Any]:
        """What becomes of the snapshot."""
        try:
            return self._train_and_save(work)
        except ModelsGoneError as error:
            self._note(str(error))
            return self._left_before_its_turn()
        except BaseException as error:  # also SystemExit, which would end the thread without a word
            log.exception("training job %s failed", self.id)
            return failure(error, traceback.format_exc())

    def _train_and_save(self, work: Work) -> dict[str, Any]:
        checkpoint, problems = self.folder.newest_checkpoint()
        self.folder.clear_outcome()
        with self._lock:
            self._outcome = None
            self._losses = list(checkpoint.losses) if checkpoint else []
            self._validation = dict(checkpoint.validation) if checkpoint else {}
            self._update(step=len(self._losses))
        for problem in problems:
            self._note(f"{problem} So the training resumes from step {len(self._losses)}.")
        self._pace.begin()
        with work.turn(lambda: self._should_leave(work)) as ready:
            if not ready:
                return self._left_before_its_turn()
            self._update(doing=Doing.STARTING)
            with self.folder.metrics.after(self._losses, self._validation):
                concept = work.train(checkpoint, lambda: self._should_leave(work), self._record)
            self._note_troubles(self.folder.prune())
            done, steps = len(self._losses), self._snapshot.steps
            if self._left_for is Wish.PAUSE and self._wish is not Wish.STOP and done < steps:
                return {"state": JobState.PAUSED}
            if done == 0:  # stopped before the first step: there is nothing to save
                return {"state": JobState.STOPPED}
            self._update(doing=Doing.SAVING)
            path = work.save(concept, self.folder.own_files)
        self._leave_thumbnail(path)
        ended = done == steps or self._left_for is None  # by itself, maybe early
        state = JobState.FINISHED if ended else JobState.STOPPED
        log.info("training job %s %s after %d steps: %s", self.id, state.value, done, path)
        return {"state": state, "concept_file": path}

    def _left_before_its_turn(self) -> dict[str, Any]:
        """Without models nothing can be learnt: what was learnt before is in the folder."""
        if self._wish is Wish.STOP:
            return self._stopped_without_models()
        return {"state": JobState.PAUSED}

    def _stopped_without_models(self) -> dict[str, Any]:
        """What was learnt, if anything was, stays in the folder."""
        file = self.folder.newest_concept()
        if file:
            self._note(
                f"Its models are not loaded any more, so no concept was saved. Queue its graph "
                f"again to resume, or take what it had learnt from a Training Job node with the "
                f"job id {self.id}."
            )
        return {"state": JobState.STOPPED, "concept_file": file}

    def _should_leave(self, work: Work) -> bool:
        """Asked between steps; waits here for others."""
        while self._leaves_for() is None and work.is_busy():
            if not self._snapshot.waiting:
                self._update(waiting=True)
            time.sleep(_POLL_S)
            self._pace.begin()
        if self._snapshot.waiting:
            self._update(waiting=False)
        self._left_for = self._leaves_for()
        return self._left_for is not None

    def _leaves_for(self) -> Wish | None:
        """Once the loop is left it is left, whatever is wished then."""
        with self._lock:
            if self._wish is Wish.GO_ON and self._left_for is None:
                self._wish = None
            return self._left_for or self._wish

    def _record(self, event: Event) -> None:
        changes = write_event(self.folder, event, self._note_troubles)
        with self._lock:
            if isinstance(event, StepDone):
                self._losses.append(event.loss)
                if event.validation is not None:
                    self._validation[event.step] = event.validation
                pace = self._pace.step(self._snapshot.seconds_per_step)
                changes["seconds_per_step"] = pace
            if changes:
                self._update(**changes)
        if isinstance(event, Notice):
            self._note(event.text())

    def _leave_thumbnail(self, concept_file: Path) -> None:
        try:
            self.folder.write_thumbnail(concept_file)
        except CustomDiffusionError as error:  # what was learnt is saved: a picture is no reason
            self._note(f"The concept has no thumbnail: {error}")

    def _note_troubles(self, troubles: list[str]) -> None:
        """Once each: they come again until they are over."""
        for trouble in troubles:
            if trouble not in self._snapshot.notes:
                self._note(trouble)

    def _note(self, trouble: str) -> None:
        log.warning("training job %s: %s", self.id, trouble)
        self._update(notes=(*self._snapshot.notes, trouble))

    def _end_at_once(self, **changes: Any) -> None:
        """Of a job that nobody works on."""
        self._write_outcome(changes)
        self._become(changes)

    def _become(self, changes: dict[str, Any]) -> None:
        with self._lock:
            if changes["state"] is JobState.PAUSED and self._wish:
                changes = self._wished_meanwhile(self._wish)
            self._outcome = self.folder.outcome()
            if changes["state"] is not JobState.QUEUED:
                self._wish = None
            if changes["state"] in ENDED:
                self._work = None  # the models that it holds are free to go
            try:
                self._update(waiting=False, doing=Doing.STEPS, **changes)
            finally:  # whoever waits is released, also where somebody who looks on fails
                if changes["state"] in ENDED:
                    self._ended.set()

    def _wished_meanwhile(self, wish: Wish) -> dict[str, Any]:
        """What becomes of a job whose loop is left, by what was wished last."""
        state = next_state(JobState.PAUSED, wish, self._can_be_saved)
        if wish is Wish.GO_ON and not self.is_loaded:
            state = JobState.PAUSED
        self._wish = wish if wish is Wish.STOP else None
        changes: dict[str, Any] = {"state": state}
        if state is JobState.STOPPED:
            changes = self._stopped_without_models()
            self._write_outcome(changes)
        return changes

    def _write_outcome(self, changes: dict[str, Any]) -> None:
        if changes["state"] is JobState.PAUSED:
            return
        last = replace(self._snapshot, **changes)
        try:
            self.folder.write_outcome(outcome_of(last))
        except (CustomDiffusionError, ValueError) as error:
            # On disk it stays paused, and can be gone on with.
            log.error("how the training job %s ended is not on disk: %s", self.id, error)

    def _update(self, **changes: Any) -> None:
        with self._lock:
            self._snapshot = replace(self._snapshot, **changes)
            if self._snapshot.state not in ACTIVE:
                self.folder.release()  # others may have it
        self._on_change(self)
