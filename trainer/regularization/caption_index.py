"""The features of a collection's captions on disk: computed once, searched in seconds.

An index is a folder of chunks: `<part>-<number>.npy` holds unit features in half precision, one row
a caption, and a .jsonl beside it what the rows are. Nothing is ever in memory but one chunk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...concept.atomic import write_atomically, write_text_atomically
from ...concept.errors import DataError
from .collection import Entry, Part, parts_of

CHUNK = 16384
"""Captions that are encoded, written and searched at once"""
Embed = Callable[[Sequence[str]], Tensor]
"""Captions → their features (n, d), of length 1"""


@dataclass(frozen=True)
class CaptionMatch:
    """A captioned picture and how near its caption is to what was asked for."""

    similarity: float
    part: Part
    entry: Entry


class CaptionIndex:
    """The index of one collection by one text encoder."""

    def __init__(self, collection: Path, folder: Path, encoder: str) -> None:
        """`folder` holds indexes; `encoder` names what embeds captions, weights and all."""
        self._parts = parts_of(collection)
        self._collection = collection
        self.name = f"captions-{_digest(str(collection.resolve()), encoder)}"
        self._folder = folder / self.name

    def update(
        self,
        embed: Embed,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> int:
        """Encodes what is new since last time; returns how many captions there are.

        `on_progress` hears how many parts are done, also between the chunks of one, and may raise
        to stop: everything that is written stays and is not computed again.
        """
        captions = 0
        for number, part in enumerate(self._parts):
            files = self._files(part)
            if not files.done.is_file():
                rows = 0
                for chunk, path in zip(_chunks(part.entries()), files.chunks(), strict=False):
                    on_progress(number, len(self._parts))
                    rows += len(chunk)
                    if not path.is_file():
                        _write_chunk(path, chunk, embed)
                write_text_atomically(files.done, str(rows))
            captions += files.rows()
        on_progress(len(self._parts), len(self._parts))
        if not captions:
            raise DataError(
                f"No picture of {self._collection} has a caption. Put a .txt file beside each, or "
                f"give another collection."
            )
        return captions

    def search(self, query: Tensor, count: int, least: float) -> list[CaptionMatch]:
        """The `count` captions nearest to a query (d,) of length 1, best first.

        Only those with a similarity of `least` or more. Raises DataError where there is none.
        """
        wanted = query.float().cpu().numpy()
        best: list[tuple[float, Path, int, Part]] = []
        nearest = -1.0
        for part in self._parts:
            files, rows = self._files(part), 0
            if not files.done.is_file():
                raise DataError(
                    f"The captions of {part.path} were not read yet, or it has changed since. "
                    f"Search again: what is new is read first."
                )
            for path in files.chunks():
                if not path.is_file():
                    break
                similarity = _features(path).astype(np.float32) @ wanted
                rows += len(similarity)
                nearest = max(nearest, float(similarity.max()))
                top = np.argsort(-similarity, kind="stable")[:count]
                found = [(float(similarity[row]), path, int(row), part) for row in top]
                best += [item for item in found if item[0] >= least]
            lost = files.rows() - rows
            if lost:
                raise DataError(
                    f"The index {self._folder} has lost {lost} captions of {part.path}. Delete it; "
                    f"it is made anew."
                )
            best = sorted(best, key=lambda item: -item[0])[:count]
        if not best:
            raise DataError(
                f"No caption of {self._collection} is as near as {least:g} to what was asked for; "
                f"the nearest has {nearest:.2f}. Ask for less, or with other words."
            )
        found_in: dict[Path, set[int]] = {}
        for _, path, row, _ in best:
            found_in.setdefault(path, set()).add(row)
        entries = {path: _entries(path, numbers) for path, numbers in found_in.items()}
        return [
            CaptionMatch(similarity, part, entries[path][row])
            for similarity, path, row, part in best
        ]

    def _files(self, part: Part) -> _Files:
        """Looks at the part, and for a folder at every file in it: once a search is enough."""
        key = _digest(str(part.path.relative_to(self._collection)), part.fingerprint())
        return _Files(self._folder, key)


@dataclass(frozen=True)
class _Files:
    """What an index holds of a part."""

    folder: Path
    key: str

    @property
    def done(self) -> Path:
        """Says how many captions the part has, once all are there."""
        return self.folder / f"{self.key}.done"

    def rows(self) -> int:
        """How many captions the part has."""
        try:
            return int(self.done.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _damaged(self.done, error) from error

    def chunks(self) -> Iterator[Path]:
        """Where its features are, or will be; without an end."""
        return (self.folder / f"{self.key}-{number:05}.npy" for number in count())


def _chunks(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    while chunk := list(islice(entries, CHUNK)):
        yield chunk


def _write_chunk(path: Path, chunk: Sequence[Entry], embed: Embed) -> None:
    """The features last: with them the chunk is complete."""
    features = embed([entry.caption for entry in chunk]).cpu().numpy().astype(np.float16)
    lines = [json.dumps(asdict(entry)) for entry in chunk]
    write_text_atomically(path.with_suffix(".jsonl"), "\n".join(lines))

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.save(file, features)

    write_atomically(path, write, features.nbytes)


def _features(path: Path) -> NDArray[np.float16]:
    try:
        features: NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)
        return features
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _entries(path: Path, rows: Set[int]) -> dict[int, Entry]:
    """What these rows of a chunk are; its lines are read once for all of them."""
    try:
        with open(path.with_suffix(".jsonl"), encoding="utf-8") as lines:
            found = {
                row: Entry(**json.loads(line)) for row, line in enumerate(lines) if row in rows
            }
        if len(found) < len(rows):
            raise ValueError("it is too short")
        return found
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _damaged(path.with_suffix(".jsonl"), error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"The index file {path} is damaged ({error}). Delete its folder; it is made anew."
    )


def _digest(*texts: str) -> str:
    return hashlib.blake2b(os.fsencode("\0".join(texts)), digest_size=8).hexdigest()
