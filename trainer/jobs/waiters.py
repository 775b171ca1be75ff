"""Those who wait for a job's end, and can be let go before it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Waiters:
    """Of one job."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        """`on_change` is called when somebody begins or ceases to wait."""
        self._events: set[threading.Event] = set()
        self._on_change = on_change

    def __bool__(self) -> bool:
        return bool(self._events)

    @contextmanager
    def one_more(self) -> Iterator[threading.Event]:
        """While the context lasts somebody waits; the event says that they are not to any more."""
        let_go = threading.Event()
        self._events.add(let_go)
        self._on_change()
        try:
            yield let_go
        finally:
            self._events.discard(let_go)
            self._on_change()

    def let_go(self) -> bool:
        """Lets all go who wait now: from then on nobody does. Whether there was somebody."""
        waiting, self._events = self._events, set()
        for event in waiting:
            event.set()
        self._on_change()
        return bool(waiting)
