"""Files of a job that are named by the step they are of: 000000050.safetensors."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ...concept.atomic import write_atomically

_STEP = re.compile("[0-9]{1,9}")


def step_file(folder: Path, step: int, suffix: str = ".safetensors") -> Path:
    return folder / f"{step:09}{suffix}"


def step_files(folder: Path, suffix: str = ".safetensors") -> list[Path]:
    """All that there are, in order; the stem of each is a number."""
    named = (path for path in folder.glob(f"*{suffix}") if _STEP.fullmatch(path.stem))
    return sorted(path for path in named if path.is_file())


def remove(paths: Iterable[Path]) -> list[str]:
    """Which could not be removed, and why: Windows removes no file that some program has open."""
    troubles = []
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            troubles.append(
                f"{path} is not needed any more and could not be removed ({error.strerror}): close "
                f"the program that has it open. It is tried again at the next checkpoint and at "
                f"the end."
            )
    return troubles


def share_unless_gone(source: Path, target: Path) -> None:
    """The same file under another name: no byte of it is read, and removing one leaves the other.
    On a file system without hard links a copy. Nothing where the source is removed meanwhile.

    It is complete or absent. Raises ConceptFileError when the disk is full.
    """
    with suppress(OSError):  # for the copy to say
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)
        return
    with suppress(FileNotFoundError), open(source, "rb") as content:

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                shutil.copyfileobj(content, file)

        write_atomically(target, write, os.fstat(content.fileno()).st_size)
