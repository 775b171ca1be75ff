"""Threads that answer requests, so that nobody's long request takes the threads of others.

asyncio has a pool that all of ComfyUI shares, and its line has no end. These threads are daemons:
a server that is to end does not wait for an inspection.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from ....concept.errors import CustomDiffusionError

Result = TypeVar("Result")


class TooBusyError(CustomDiffusionError):
    """So many wait already that one more would wait too long."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(
            f"The server works on as many requests of this kind as it takes at a time. Ask again "
            f"in {retry_after_s} s."
        )
        self.retry_after_s = retry_after_s


class Workers:
    """A few threads, which start with the first call, and a line of limited length before them."""

    def __init__(self, name: str, *, threads: int, waiting: int, retry_after_s: int) -> None:
        self._name = f"custom-diffusion-{name}"
        self._threads = threads
        self._retry_after_s = retry_after_s
        self._line: queue.Queue[Callable[[], None]] = queue.Queue(waiting)
        self._started = False

    async def run(self, call: Callable[[], Result]) -> Result:
        """On one of the threads. `call` must not raise. Raises TooBusyError when the line is full.

        To be awaited in one event loop only.
        """
        future: Future[Result] = Future()
        try:
            self._line.put_nowait(lambda: _settle(future, call))
        except queue.Full as error:
            raise TooBusyError(self._retry_after_s) from error
        if not self._started:
            self._started = True
            for number in range(self._threads):
                name = f"{self._name}-{number}"
                threading.Thread(target=self._work, name=name, daemon=True).start()
        return await asyncio.wrap_future(future)

    def _work(self) -> None:
        while True:
            self._line.get()()


def _settle(future: Future[Result], call: Callable[[], Result]) -> None:
    """Unless whoever asked has gone meanwhile."""
    if future.set_running_or_notify_cancel():
        future.set_result(call())
