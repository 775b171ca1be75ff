"""What commands show while they work, and what they say about files."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from ..concept.atomic import try_place
from ..concept.concept import Concept
from ..concept.errors import ConceptFileError
from ..concept.file import size_of, write_concept


def progress(bar: tqdm[None]) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return show


def check_new(output: Path) -> None:
    """Raises ConceptFileError where something is there already, or nothing can be written there."""
    if os.path.lexists(output):
        raise ConceptFileError(
            f"{output} exists already. Choose another --output, or move it away."
        )
    try_place(output)


def save(concept: Concept, path: Path) -> None:
    write_concept(concept, path)
    say_saved(concept, path)


def say_saved(concept: Concept, path: Path) -> None:
    print(f"saved {path} ({size_of(path)}): {concept.describe()}")


def save_at_any_rate(write: Callable[[Path], object], output: Path) -> None:
    """Writes what took long to make to `output`; where that cannot be any more, to the first place
    that takes it: beside it, in the working folder, in the folder of temporary files.

    Raises ConceptFileError with the cause and, where it is saved elsewhere, that place.
    """
    try:
        write(output)
        return
    except (ConceptFileError, FileExistsError) as error:
        cause: Exception = error
        why = str(error) if isinstance(error, ConceptFileError) else f"{output} exists by now."
    for folder in (output.parent, Path.cwd(), Path(tempfile.gettempdir())):
        place = folder / f"rescued-{uuid.uuid4().hex[:8]}.safetensors"
        try:
            write(place)
        except (ConceptFileError, FileExistsError):
            continue
        raise ConceptFileError(f"{why} The result is saved as {place}.") from cause
    raise cause


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
