"""Files that somebody else may have put there: only regular ones are opened, and read up to a size.

A pipe or a device that has the name of a picture would block for ever, or never end.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotRegularError(OSError):
    """Something that is no regular file. `strerror` says what it is."""


def open_regular(path: Path) -> BufferedReader:
    """Opens a file, or what a link leads to, for reading. Raises NotRegularError where it is no
    regular file, other OSErrors as usual, and never waits.
    """
    try:  # before opening: some devices do something when they are opened
        _check(path, os.stat(path))
    except ValueError as error:  # it holds a NUL, or half a character
        raise FileNotFoundError(errno.ENOENT, "no file can be called that", str(path)) from error
    # What comes between the check and the opening neither blocks (not known to Windows) nor passes.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        _check(path, os.fstat(file.fileno()))
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: Path, most_bytes: int) -> bytes:
    """All of a regular file. Raises OSError where it is something else, or larger."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size  # 0 for what the system makes up, below /proc
        if size > most_bytes:
            raise OSError(errno.EFBIG, f"it is larger than {most_bytes / 1e6:g} MB", str(path))
        return file.read(size)


def _check(path: Path, status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        what = _KINDS.get(kind, "something else")
        raise NotRegularError(errno.EINVAL, f"it is {what}, not a file", str(path))
