"""Which process has a job: files in its folder that a process locks. The system frees the locks of
a process that dies.

    .claim   by the process that has the job in its queue, or works on it
    .lock    by the process that works on it

A paused job is nobody's: who queues it first has it.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from filelock import FileLock, Timeout

LOCK, CLAIM = ".lock", ".claim"
_PATIENCE_S = 1.0
"""Whoever only asks has a lock for a moment."""


def acquire(folder: Path, name: str, timeout_s: float = _PATIENCE_S) -> FileLock:
    """Any thread may release what is returned. Raises Timeout where another has the lock, and
    OSError where the folder is gone or cannot be written.
    """
    path = folder / name
    if not folder.is_dir():  # it would be made again
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    if path.is_symlink():  # what it points at is no lock of ours
        raise OSError(errno.ELOOP, "its lock is a link")
    lock = FileLock(path, timeout=timeout_s, thread_local=False)
    lock.acquire()
    return lock


def is_taken(folder: Path, name: str) -> bool:
    """Whether some process has the lock at this moment."""
    if not (folder / name).is_file():  # no lock file is made by looking
        return False
    try:
        acquire(folder, name, 0).release()
    except Timeout:
        return True
    except OSError:  # a folder that nobody can write
        return False
    return False
