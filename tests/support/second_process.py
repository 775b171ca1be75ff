"""Another process that works in the same folder of jobs, by the words that it is sent.

busy NAME      begins a job that does not end
queue NAME     queues one behind it
state ID       how a job looks from there
pause ID, stop ID, resume ID, delete ID
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType

from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import CustomDiffusionError
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.trainer.jobs.service import TrainingService
from custom_diffusion.trainer.jobs.work import Work


class SecondProcess:
    def __init__(self, jobs: Path) -> None:
        self._jobs = jobs

    def __enter__(self) -> SecondProcess:
        tests = Path(__file__).parents[1]
        code = (
            f"import sys; sys.path.insert(0, {str(tests)!r}); import conftest; "
            f"from support.second_process import serve; serve(sys.argv[1])"
        )
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(self._jobs)], stdin=pipe, stdout=pipe, text=True
        )
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.kill()

    def __call__(self, verb: str, name: str) -> str:
        """What it answers: an id, a state, or "refused: " and why."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps([verb, name]), file=self._process.stdin, flush=True)
        return str(json.loads(self._process.stdout.readline()))

    def kill(self) -> None:
        """With SIGKILL: it has no time to tidy up."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()


def endless(began: threading.Event, jobs: Path) -> Work:
    """A training that waits until it is asked to leave."""

    def train(_: object, should_stop: object, on_event: object) -> Concept:
        began.set()
        while not should_stop():  # type: ignore[operator]
            threading.Event().wait(0.01)
        return Concept(FAMILIES["sd15"], {})

    return Work(train, lambda concept, own_files: jobs / "saved")


def serve(folder: str) -> None:
    """The other end of `SecondProcess`."""
    jobs = Path(folder)
    service, began = TrainingService(jobs), threading.Event()
    for line in sys.stdin:
        verb, name = json.loads(line)
        try:
            answer = _done(service, began, jobs, verb, name)
        except CustomDiffusionError as error:
            answer = f"refused: {error}"
        print(json.dumps(answer), flush=True)


def _done(
    service: TrainingService, began: threading.Event, jobs: Path, verb: str, name: str
) -> str:
    if verb in ("busy", "queue"):
        job = service.submit(name, 5, {}, endless(began, jobs), name)
        assert began.wait(60)
        return job.id
    if verb != "state":
        getattr(service, verb)(name)
        return "done"
    return service.job(name).snapshot().state.value
