"""A captioned collection on disk: folders with .txt files, webdataset shards, parquet tables.

img2dataset writes all three. A collection is read part by part, so that it may be of any size. It
comes from strangers: nothing that it says leads out of it, and no part of it is read without bound.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ...concept.errors import ConfigError, DataError
from ...concept.regular_files import open_regular, read_regular
from ...pictures.opening import IMAGE_SUFFIXES, MOST_BYTES, PictureError
from ..data.folders import MOST_CAPTION_BYTES

_CAPTION_COLUMNS = ("caption", "text", "TEXT")
_PATH_COLUMNS = ("path", "image_path", "file_name")
_KEY_COLUMN = "key"  # img2dataset: the picture is `00000/000001234.jpg` beside `00000.parquet`
_MOST_JSON_BYTES = 1_000_000
_MOST_READ_BYTES = 2_000_000
"""Of a shard at once: a header of its own says how long it is"""
_MOST_COLUMN_BYTES = 500_000_000
"""Of a group of a table's rows"""
_ROWS = 4096


@dataclass(frozen=True)
class Entry:
    """A captioned picture of a part."""

    caption: str
    location: str
    """Member of a shard, or path below the part's folder"""
    start: int = 0
    size: int | None = None
    """Of the bytes inside a shard, so that one picture is read without those before it."""

    def __post_init__(self) -> None:
        numbers = (self.start, 0 if self.size is None else self.size)
        if not isinstance(self.caption, str) or not isinstance(self.location, str):
            raise TypeError("a caption or a location is no text")
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError("a place in a shard is no natural number")

    @property
    def suffix(self) -> str:
        """`.jpg`"""
        return PurePosixPath(self.location).suffix.lower()


@dataclass(frozen=True)
class Part:
    """What is read at once: a shard, a table, or the pictures that lie in one folder."""

    path: Path

    def fingerprint(self) -> str:
        """Changes when the part does."""
        try:
            if not self.path.is_dir():
                status = self.path.stat()
                return f"{status.st_size}:{status.st_mtime_ns}"
            with os.scandir(self.path) as files:
                times = [file.stat().st_mtime_ns for file in files if file.is_file()]
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be read ({error.strerror}). Put it back, or remove it."
            ) from error
        return f"{len(times)}:{max(times, default=0)}"

    def entries(self) -> Iterator[Entry]:
        """All that have a caption. Raises DataError naming a file that cannot be read."""
        if self.path.is_dir():
            return _of_folder(self.path)
        return _of_shard(self.path) if self.path.suffix == ".tar" else _of_table(self.path)

    def read(self, entry: Entry) -> bytes:
        """The file of a picture, as it is. Raises PictureError where it is none that may be read,
        DataError where it is gone.
        """
        name = f"The picture {entry.location[:200]} of {self.path}"
        try:
            if entry.suffix not in IMAGE_SUFFIXES:
                raise OSError(f"it is none of {', '.join(IMAGE_SUFFIXES)}")
            if entry.size is not None:
                return _read_part(self.path, entry.start, entry.size)
            return read_regular(self._file_of(entry), MOST_BYTES)
        except FileNotFoundError as error:
            raise DataError(
                f"{name} cannot be read ({error}). Was the collection changed? Search again: the "
                f"index follows it."
            ) from error
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PictureError(f"{name} cannot be used ({reason}).") from error

    def _file_of(self, entry: Entry) -> Path:
        """Raises OSError where that is outside the part."""
        folder = self.path if self.path.is_dir() else self.path.parent
        location = PureWindowsPath(entry.location)  # knows both kinds of paths
        path = folder / entry.location
        outside = bool(location.anchor) or ".." in location.parts
        # In a folder links are the user's own; what a table says is a stranger's.
        if not outside and folder != self.path:
            outside = not path.resolve().is_relative_to(folder.resolve())
        if outside:
            raise OSError("it lies outside the collection")
        return path


def parts_of(collection: Path) -> list[Part]:
    """The parts of a collection, by path. Raises DataError when there are none."""
    parts = []
    for folder, _, files in os.walk(collection):
        # Of separate files there may be millions: they are looked at by name, not as paths.
        names = set(files)
        shards = {name for name in names if name.endswith(".tar")}
        # Beside its shard a table says nothing that the shard does not.
        tables = {
            name
            for name in names
            if name.endswith(".parquet") and f"{name.removesuffix('.parquet')}.tar" not in shards
        }
        parts += [Part(Path(folder, name)) for name in shards | tables]
        covered = bool(Path(folder).name) and Path(folder).with_suffix(".parquet").is_file()
        if not covered and any(_is_picture(name) for name in names):
            parts.append(Part(Path(folder)))
    if not parts:
        raise DataError(
            f"{collection} is no collection: no pictures with .txt files, no .tar shards and no "
            f".parquet tables lie there. Give the folder that holds them."
        )
    return sorted(parts, key=lambda part: part.path)


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _read_part(path: Path, start: int, size: int) -> bytes:
    if size > MOST_BYTES:
        raise OSError(f"it is larger than {MOST_BYTES / 1e6:g} MB")
    with open_regular(path) as shard:
        if start + size > os.fstat(shard.fileno()).st_size:
            raise FileNotFoundError("the shard ends before it")
        shard.seek(start)
        return shard.read(size)


def _of_folder(folder: Path) -> Iterator[Entry]:
    names = set(os.listdir(folder))
    for name in sorted(names):
        text = f"{os.path.splitext(name)[0]}.txt"
        if _is_picture(name) and text in names:
            try:
                with open_regular(folder / text) as file:
                    caption = _one_line(file.read(MOST_CAPTION_BYTES))
            except OSError as error:
                raise DataError(
                    f"The caption {folder / text} cannot be read ({error.strerror}). Put a text "
                    f"file there, or move it away."
                ) from error
            if caption:
                yield Entry(caption, name)


class _Shard(io.BufferedReader):
    """A file for tarfile, which believes what headers say of their own length."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MOST_READ_BYTES:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return super().read(size)


def _of_shard(path: Path) -> Iterator[Entry]:
    """Members of one sample follow each other and share a name up to the first dot."""
    key, caption, picture = "", "", None
    try:
        with (
            _Shard(open_regular(path).detach()) as file,
            tarfile.open(fileobj=file, mode="r:") as shard,
        ):
            for member in _members(shard):
                name = PurePosixPath(member.name)
                stem, _, extension = name.name.partition(".")
                if str(name.parent / stem) != key:
                    if caption and picture:
                        yield _member_entry(caption, picture)
                    key, caption, picture = str(name.parent / stem), "", None
                if f".{extension}".lower() in IMAGE_SUFFIXES:
                    picture = member
                elif extension in ("txt", "json") and not caption:
                    content = _start_of(shard, member)
                    caption = _one_line(content) if extension == "txt" else _json_caption(content)
            if caption and picture:
                yield _member_entry(caption, picture)
    except (OSError, tarfile.TarError, ValueError, ArithmeticError, RecursionError) as error:
        raise DataError(
            f"The shard {path} cannot be read ({error}). Download it again, or move it away."
        ) from error


def _members(shard: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of a shard, not its links and devices, nor what has holes: that is longer than the
    shard.
    """
    place = -1
    while member := shard.next():
        shard.members.clear()  # type: ignore[attr-defined]  # of which there may be millions
        if member.offset_data <= place:  # a negative size leads back
            raise tarfile.ReadError("its members lie in each other")
        place = member.offset_data
        if member.isreg() and not member.issparse():
            yield member
    shard.fileobj.seek(shard.offset)
    if shard.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("what comes after some members is none")  # tarfile ends there


def _start_of(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = shard.extractfile(member)
    return file.read(_MOST_JSON_BYTES) if file else b""


def _member_entry(caption: str, member: tarfile.TarInfo) -> Entry:
    return Entry(caption, member.name, member.offset_data, member.size)


def _of_table(path: Path) -> Iterator[Entry]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"{path} is a parquet table, which the package pyarrow reads. Install it with "
            f"`pip install pyarrow`, or use the collection's .tar shards or folders."
        ) from error
    try:
        with open_regular(path) as file:
            captions, places = _columns(path, pyarrow.parquet.ParquetFile(file))
            # As in the file: a long text that stands there once is not repeated for every row.
            table = pyarrow.parquet.ParquetFile(file, read_dictionary=[captions, places])
            pictures = _pictures_by_key(path) if places == _KEY_COLUMN else None
            for batch in table.iter_batches(_ROWS, columns=[captions, places]):
                columns = (_texts(batch.column(name)) for name in (captions, places))
                for caption, place in zip(*columns, strict=True):
                    where = pictures.get(str(place)) if pictures is not None else place
                    if caption and where:
                        yield Entry(_words(caption), str(where))
    except (OSError, ValueError, LookupError, MemoryError, pyarrow.ArrowException) as error:
        raise DataError(
            f"The table {path} cannot be read ({error}). Download it again, or move it away."
        ) from error


def _columns(path: Path, table: Any) -> tuple[str, str]:
    """Which columns of a table say what a picture shows and where it lies."""
    types = dict(zip(table.schema_arrow.names, table.schema_arrow.types, strict=True))
    captions = next((name for name in _CAPTION_COLUMNS if name in types), "")
    places = next((name for name in (*_PATH_COLUMNS, _KEY_COLUMN) if name in types), "")
    if not captions or not places:
        raise DataError(
            f"The table {path} has the columns {', '.join(types)}. Needed are one of "
            f"{', '.join(_CAPTION_COLUMNS)} and one of {', '.join((*_PATH_COLUMNS, _KEY_COLUMN))}, "
            f"which say what a picture shows and where it lies. A table of web addresses alone "
            f"must be downloaded first."
        )
    for name in (captions, places):
        if str(types[name]) not in ("string", "large_string"):
            raise ValueError(f"its column {name} holds {types[name]}, not texts")
    for group in range(table.metadata.num_row_groups):
        parts = table.metadata.row_group(group)
        for part in (parts.column(number) for number in range(parts.num_columns)):
            large = part.total_uncompressed_size > _MOST_COLUMN_BYTES
            if large and part.path_in_schema in (captions, places):
                raise ValueError(
                    f"its column {part.path_in_schema} has more than "
                    f"{_MOST_COLUMN_BYTES / 1e6:g} MB in a group of rows"
                )
    return captions, places


def _texts(column: Any) -> list[str | None]:
    """Of a column that is a dictionary. Raises ValueError where a text is too long."""
    import pyarrow.compute

    longest = pyarrow.compute.max(pyarrow.compute.binary_length(column.dictionary)).as_py() or 0
    if longest > MOST_CAPTION_BYTES:
        raise ValueError(f"a text has {longest} bytes, at most {MOST_CAPTION_BYTES} are read")
    texts: list[str | None] = column.dictionary_decode().to_pylist()
    return texts


def _pictures_by_key(table: Path) -> dict[str, str]:
    folder = table.with_suffix("")
    if not folder.is_dir():
        raise DataError(
            f"The pictures of the table {table} are missing: neither {folder.name}.tar nor a "
            f"folder {folder.name} lies beside it. Download them with img2dataset, or move the "
            f"table away."
        )
    return {
        file.stem: f"{folder.name}/{file.name}"
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES
    }


def _one_line(content: bytes) -> str:
    """Crawled captions are not always UTF-8; one letter more or less does not change a search, nor
    does what comes after some thousand.
    """
    return _words(content[:MOST_CAPTION_BYTES].decode("utf-8-sig", errors="replace"))


def _json_caption(content: bytes) -> str:
    if len(content) == _MOST_JSON_BYTES:
        raise ValueError(f"the .json of a picture is larger than {_MOST_JSON_BYTES / 1e6:g} MB")
    sample = json.loads(content)
    caption = sample.get("caption") if isinstance(sample, dict) else None
    return _words(caption[:MOST_CAPTION_BYTES]) if isinstance(caption, str) else ""


def _words(text: str) -> str:
    """On one line, and without halves of characters, which JSON can spell and no file can hold."""
    return " ".join(text.encode(errors="replace").decode().split())
