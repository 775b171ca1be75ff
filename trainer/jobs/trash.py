"""Removing the folder of a job: first it is renamed, so that it is gone at once or not at all, and
then its files are removed. Windows removes no file that some program has open.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ...concept.errors import JobError

TRASH = ".deleted-"
"""What the names of folders begin with that are being removed"""
_SHOWN = 5


def delete_folder(folder: Path, check_free: Callable[[Path], None]) -> None:
    """Removes a folder with all that is in it.

    `check_free` raises JobError where some process works in it, and is asked before and after
    nobody can find it any more. Raises JobError too where a program has one of the files open: then
    nothing is removed; and where files are left, which `clear_trash` tries again.
    """
    check_free(folder)
    try:
        moved = folder.rename(folder.with_name(f"{TRASH}{uuid.uuid4().hex}"))
    except FileNotFoundError:  # another process was quicker
        return
    except OSError as error:
        held = _held(folder)
        way = f"Close the programs that hold {_some(held)}" if held else "Close what uses it"
        raise JobError(
            f"The job's folder {folder} could not be removed ({error.strerror}), and nothing of "
            f"it was. {way}, and delete the job again."
        ) from error
    try:
        check_free(moved)
    except JobError:
        moved.rename(folder)
        raise
    left = clear_trash(folder.parent)
    if left:
        raise JobError(
            f"The training job {folder.name} is deleted, but of its files {_some(left)} could not "
            f"be removed. Close the programs that have them open: they are removed with the next "
            f"job that is deleted, and at the next start."
        )


def clear_trash(jobs: Path) -> list[Path]:
    """Removes what deletions have left in the folder of all jobs; what is left of it then."""
    left: list[Path] = []
    for trash in sorted(jobs.glob(f"{TRASH}*")):
        if trash.is_symlink():  # what it points at is somebody else's
            with suppress(OSError):
                trash.unlink()
        shutil.rmtree(trash, ignore_errors=True)
        files = [path for path in sorted(trash.rglob("*")) if not path.is_dir()]
        left += files or ([trash] if os.path.lexists(trash) else [])
    return left


def _held(folder: Path) -> list[Path]:
    """The files that some program holds: they cannot even be renamed to what they are called."""
    held = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            path.replace(path)
        except OSError:
            held.append(path)
    return held


def _some(paths: list[Path]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(map(str, paths[:_SHOWN])) + more
