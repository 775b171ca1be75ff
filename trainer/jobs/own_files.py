"""The files that a job has saved outside its folder, known again by what is in them.

So a job that goes on replaces what it had saved by then, and never a file of anybody else: one that
was edited, or has taken the name since, is none of its own any more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from ...concept.atomic import BeforeNaming, write_text_atomically
from ...concept.naming import write_new
from ...concept.regular_files import open_regular, read_regular

_MOST_BYTES = 1_000_000
_CHUNK_BYTES = 2**20


class Writer(Protocol):
    """Writes a complete file: `write_atomically` with the content given."""

    def __call__(self, path: Path, *, replace: bool, before_naming: BeforeNaming) -> object: ...


class OwnFiles:
    """Those of one job. What is about to be written is recorded before it has its name, beside what
    is there: so whenever the process dies, the file that then has the name is known.
    """

    def __init__(self, record: Path) -> None:
        """`record` is a file in the job's folder."""
        self._record = record

    def holds(self, path: Path) -> bool:
        """Whether there is a file with content that this job has written there."""
        known = self._known().get(str(path), ())
        return bool(known) and _digest(path) in known

    def has_lost(self, path: Path) -> bool:
        """Whether this job has written a file there, and another content is there now."""
        return str(path) in self._known() and not self.holds(path)

    def write(self, path: Path, write: Writer) -> Path:
        """Exactly there. Raises FileExistsError where the file is somebody else's."""
        write(path, replace=self.holds(path), before_naming=partial(self._remember, path))
        return path

    def write_named(self, folder: Path, name: str, write: Writer) -> Path:
        """Over the newest of its own files in the folder; where there is none, as a new one that is
        called `name`, or with a number where that is taken.
        """
        for path in reversed([Path(path) for path in self._known()]):
            if path.parent == folder and self.holds(path):
                return self.write(path, write)
        return write_new(folder, name, lambda path: self.write(path, write))

    def _remember(self, path: Path, written: Path) -> None:
        known = dict(self._known())
        before = known.pop(str(path), [])
        there = _digest(path)
        known[str(path)] = [*(each for each in before if each == there), str(_digest(written))]
        write_text_atomically(self._record, json.dumps(known))

    def _known(self) -> Mapping[str, list[str]]:
        """Path → digests of what the job has written there; none where the record is damaged."""
        try:
            known = json.loads(read_regular(self._record, _MOST_BYTES))
        except (OSError, ValueError, RecursionError):  # then no file is taken for the job's
            return {}
        if not isinstance(known, dict):
            return {}
        return {path: each for path, each in known.items() if isinstance(each, list)}


def _digest(path: Path) -> str | None:
    """Of a file's content; None where there is no file that can be read."""
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()
