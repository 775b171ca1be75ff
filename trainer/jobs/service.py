"""The training service: owns the jobs, and the one thread that runs them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...concept.errors import CustomDiffusionError, JobError, UnknownJobError
from .folder import JobFolder
from .job import Job
from .snapshot import ACTIVE, JobState
from .trash import clear_trash
from .work import Work

log = logging.getLogger("custom_diffusion")


class TrainingService:
    """The jobs of a folder, run one by one in their order in the queue.

    Jobs that other processes left there, or run, are among them.
    """

    def __init__(
        self,
        folder: Path,
        on_change: Callable[[Job], None] = lambda job: None,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change` is called on any thread when a job's snapshot is another; it may look at the
        job, but must not come back to the service. `on_idle` is called when no job is left to run.
        """
        self.deleted = 0
        """How many jobs were deleted"""
        self.released = 0
        """How often somebody who waited for a job was let go"""
        self._folder = folder
        self._listener, self._on_idle = on_change, on_idle
        self._jobs: dict[str, Job] = {}
        self._queue: list[Job] = []
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._closed = False
        clear_trash(folder)

    def submit(
        self,
        name: str,
        steps: int,
        description: dict[str, Any],
        work: Work,
        fingerprint: str = "",
        ends_early: str = "",
        on_next: Callable[[], None] = lambda: None,
    ) -> Job:
        """Queues a job and returns it. Its `description` is written to its folder. `on_next` is
        called before where no other job has its turn earlier.

        A job with the same fingerprint, which says what goes into each step, and as many steps goes
        on from where it is; one that has ended early, only where it was to end by the same rule. A
        new job begins where one with the same fingerprint has come to.
        """
        with self._lock:
            job = self.find(fingerprint, steps, ends_early)
            if job and job.snapshot().state is JobState.FINISHED:
                return job
            if job:
                job.queue(work)
            else:
                asked = {"steps": steps, "fingerprint": fingerprint}
                early = {"ends_early": ends_early} if ends_early else {}
                description = {**asked, **early, **description}
                before = self._furthest(fingerprint, steps)
                folder = JobFolder.create(self._folder, name, description)
                if before:
                    self._begin_where(folder, before, steps)
                job = self._jobs[folder.id] = Job(folder, work, self._tell)
            if not any(other.runs_here for other in self._jobs.values() if other is not job):
                on_next()
            self._enqueue(job)
            return job

    def join(self, fingerprint: str, steps: int, ends_early: str = "") -> Job | None:
        """The job that does the same and has finished, waits for its turn or is at work: a pause
        that it was asked for is taken back. Raises JobError where it is being stopped.
        """
        with self._lock:
            job = self.find(fingerprint, steps, ends_early)
            if job and job.runs_here:
                job.queue()
                self._enqueue(job)
            return job if job and job.snapshot().state in (*ACTIVE, JobState.FINISHED) else None

    def find(self, fingerprint: str, steps: int, ends_early: str = "") -> Job | None:
        """The newest job that does the same; of finished ones only if its concept is there, and not
        another under its name.
        """
        for job in reversed(self._like(fingerprint)):
            snapshot, file = job.snapshot(), job.snapshot().concept_file
            finished = snapshot.state is JobState.FINISHED
            there = file and file.is_file() and not job.folder.own_files.has_lost(file)
            early = finished and snapshot.step < steps
            same = not early or job.folder.description.ends_early == ends_early
            if same and snapshot.steps == steps and (there or not finished):
                return job
        return None

    def _begin_where(self, folder: JobFolder, before: JobFolder, steps: int) -> None:
        try:
            folder.begin_where(before, steps)
        except CustomDiffusionError:  # the disk is full: no half of a job is left
            folder.delete()
            raise
        log.info("training job %s begins where %s has come to", folder.id, before.id)

    def _furthest(self, fingerprint: str, steps: int) -> JobFolder | None:
        """Of the jobs that take the same steps, the one that has come furthest on this way."""
        folders = [job.folder for job in self._like(fingerprint)]
        reached = {folder: folder.newest_step(steps) for folder in folders}
        furthest = max(folders, key=reached.__getitem__, default=None)
        return furthest if furthest and reached[furthest] else None

    def _like(self, fingerprint: str) -> list[Job]:
        """The jobs of that fingerprint, the oldest first."""
        jobs = self.jobs() if fingerprint else []
        return [job for job in jobs if job.folder.description.fingerprint == fingerprint]

    def jobs(self) -> list[Job]:
        """All of the folder, the oldest first. Those that cannot be read are failed ones, and say
        why.
        """
        with self._lock:
            folders = {folder.id: folder for folder in JobFolder.all_in(self._folder)}
            for job_id in self._jobs.keys() - folders.keys():
                if not self._jobs[job_id].runs_here:  # somebody has removed its folder
                    self._jobs.pop(job_id).forget()
            for job_id in folders.keys() - self._jobs.keys():
                self._jobs[job_id] = Job(folders[job_id], on_change=self._tell)
            return sorted(self._jobs.values(), key=_age)

    def job(self, job_id: str) -> Job:
        with self._lock:
            known = {job.id: job for job in self.jobs()}
            if job_id not in known:
                raise UnknownJobError(
                    f"There is no training job {job_id!r}; known jobs: "
                    f"{', '.join(known) or 'none'}."
                )
            return known[job_id]

    def queued(self) -> list[str]:
        """Ids of the jobs that wait for their turn, the next one first."""
        with self._lock:
            return [job.id for job in self._queue if job.snapshot().state is JobState.QUEUED]

    def pause(self, job_id: str) -> None:
        """Asks a job to write a checkpoint and let go of the device."""
        self.job(job_id).pause()

    def resume(self, job_id: str) -> None:
        """Lets a paused job go on before those that wait."""
        with self._lock:
            job = self.job(job_id)
            job.queue()
            self._enqueue(job, 0)

    def stop(self, job_id: str) -> None:
        """Asks a job to save what was learnt and end."""
        with self._lock:
            job = self.job(job_id)
            job.stop()
            self._enqueue(job, 0)  # one that is paused has to run to be saved

    def release(self, job_id: str) -> None:
        """Lets those go who wait for a job; it goes on, or stays paused. Raises JobError where
        nobody waits.
        """
        if not self.job(job_id).waiters.let_go():
            raise JobError(f"No prompt waits for the training job {job_id}.")
        self.released += 1

    def reorder(self, job_id: str, position: int) -> None:
        """Moves a job that waits to this place among them, 0 for the next one."""
        with self._lock:
            waiting = self.queued()
            if job_id not in waiting:
                raise JobError(
                    f"The training job {job_id!r} does not wait for its turn; those that do: "
                    f"{', '.join(waiting) or 'none'}."
                )
            self._enqueue(self.job(job_id), position)

    def delete(self, job_id: str) -> None:
        """Removes a job and its folder, not the concept that it saved.

        Raises JobError while somebody has the job or one of its files, and where files are left.
        """
        with self._lock:
            job = self.job(job_id)
            try:
                job.delete()
            finally:  # it is gone also where some of its files are left
                if not job.folder.path.exists():
                    del self._jobs[job_id]
                    self.deleted += 1

    def close(self, timeout_s: float) -> None:
        """Pauses whatever runs, which writes a checkpoint; waits that long for it."""
        with self._lock:
            self._closed = True
            thread, jobs = self._thread, list(self._jobs.values())
            for job in jobs:
                if job.runs_here:
                    job.pause()
        if thread:
            thread.join(timeout_s)

    def _enqueue(self, job: Job, position: int | None = None) -> None:
        """Puts a job that is ready into the queue, or elsewhere in it, and sees that it is run."""
        if job.snapshot().state is not JobState.QUEUED:
            return
        if job in self._queue and position is None:
            return
        self._queue = [other for other in self._queue if other is not job]
        self._queue.insert(len(self._queue) if position is None else position, job)
        self._see_to_it()

    def _see_to_it(self) -> None:
        """Starts the thread where there is something to do and none that does it."""
        if self._queue and self._thread is None and not self._closed:
            thread = threading.Thread(
                target=self._work, name="custom-diffusion-trainer", daemon=True
            )
            thread.start()  # its first step waits for this lock
            self._thread = thread

    def _work(self) -> None:
        """Ends when there is nothing left to do."""
        try:
            while job := self._next():
                job.run()
                with self._lock:
                    self._enqueue(job, 0)  # where it was to go on, or stop, while it was left
        finally:  # whatever a job has done to this thread, the next one has its turn
            with self._lock:
                self._thread = None
                self._see_to_it()
                if self._thread is None:
                    self._on_idle()

    def _next(self) -> Job | None:
        with self._lock:
            return self._queue.pop(0) if self._queue and not self._closed else None

    def _tell(self, job: Job) -> None:
        try:
            self._listener(job)
        except Exception:  # somebody who only looks on must not end a training
            log.exception("a listener failed on the training job %s", job.id)


def _age(job: Job) -> tuple[float, str]:
    return job.folder.description.created, job.id
