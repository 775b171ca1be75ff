"""Windows' rule, on Linux: a file that is open or mapped is not removed, renamed or replaced, and
no folder is renamed that holds one.
"""

from __future__ import annotations

import errno
import os
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

IN_USE = "The process cannot access the file because it is being used by another process"


def files_in_use() -> set[str]:
    """The regular files that this process has open or mapped."""
    held = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            held.add(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # the listing's own
            continue
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        held |= {line[73:].rstrip("\n") for line in maps if "/" in line}
    return {path for path in held if os.path.isfile(path)}


def as_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, for this process, also inside of shutil and pathlib."""
    for name in ("unlink", "remove", "rename", "replace"):
        refusing = _refusing(getattr(os, name))
        monkeypatch.setattr(os, name, refusing)
        # Python 3.10's pathlib keeps the functions it saw when it was imported.
        kept = getattr(pathlib, "_NormalAccessor", None)
        if kept is not None and hasattr(kept, name):
            monkeypatch.setattr(kept, name, staticmethod(refusing))


def _refusing(change: Callable[..., None]) -> Callable[..., None]:
    def refuse_or_change(*paths: Any, dir_fd: int | None = None, **options: Any) -> None:
        for path in paths:
            place = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            real = os.path.realpath(os.path.join(place, os.fspath(path)))
            if any(Path(held).is_relative_to(real) for held in files_in_use()):
                error = PermissionError(errno.EACCES, IN_USE, str(path))
                error.winerror = 32  # type: ignore[attr-defined]
                raise error
        change(*paths, **({} if dir_fd is None else {"dir_fd": dir_fd}), **options)

    return refuse_or_change
