"""What commands show while they work, and what they say about files."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from ..concept.concept import Concept
from ..concept.errors import ConceptFileError
from ..concept.file import size_of, write_concept


def progress(bar: tqdm[None]) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return show


def check_new(output: Path) -> None:
    if os.path.lexists(output):
        raise ConceptFileError(
            f"{output} exists already. Choose another --output, or move it away."
        )


def save(concept: Concept, path: Path) -> None:
    write_concept(concept, path)
    print(f"saved {path} ({size_of(path)}): {concept.describe()}")


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks once for an orderly stop; a second one interrupts as usual."""
    asked = threading.Event()

    def ask(_signal: int, _frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
