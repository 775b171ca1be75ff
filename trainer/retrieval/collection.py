"""A captioned collection on disk: folders with .txt files, webdataset shards, parquet tables.

img2dataset writes all three. A collection is read part by part, so that it may be of any size.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...concept.errors import ConfigError, DataError
from ..data import IMAGE_SUFFIXES

_CAPTION_COLUMNS = ("caption", "text", "TEXT")
_PATH_COLUMNS = ("path", "image_path", "file_name")
_KEY_COLUMN = "key"  # img2dataset: the picture is `00000/000001234.jpg` beside `00000.parquet`


@dataclass(frozen=True)
class Entry:
    """A captioned picture of a part."""

    caption: str
    location: str
    """Member of a shard, or path below the part's folder"""
    start: int = 0
    size: int | None = None
    """Of the bytes inside a shard, so that one picture is read without those before it."""


@dataclass(frozen=True)
class Part:
    """What is read at once: a shard, a table, or the pictures that lie in one folder."""

    path: Path

    def fingerprint(self) -> str:
        """Changes when the part does."""
        if not self.path.is_dir():
            status = self.path.stat()
            return f"{status.st_size}:{status.st_mtime_ns}"
        with os.scandir(self.path) as files:
            times = [file.stat().st_mtime_ns for file in files if file.is_file()]
        return f"{len(times)}:{max(times, default=0)}"

    def entries(self) -> Iterator[Entry]:
        """All that have a caption. Raises DataError naming a file that cannot be read."""
        if self.path.is_dir():
            return _of_folder(self.path)
        return _of_shard(self.path) if self.path.suffix == ".tar" else _of_table(self.path)

    def read(self, entry: Entry) -> bytes:
        """The file of a picture, as it is. Raises DataError where it is gone."""
        try:
            if entry.size is not None:
                with open(self.path, "rb") as shard:
                    shard.seek(entry.start)
                    content = shard.read(entry.size)
                if len(content) < entry.size:
                    raise OSError("the shard ends before it")
                return content
            folder = self.path if self.path.is_dir() else self.path.parent
            return (folder / entry.location).read_bytes()
        except OSError as error:
            raise DataError(
                f"The picture {entry.location} of {self.path} cannot be read ({error}). Was the "
                f"collection changed? Search again: the index follows it."
            ) from error


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
        covered = Path(folder).with_suffix(".parquet").is_file()
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


def _of_folder(folder: Path) -> Iterator[Entry]:
    names = set(os.listdir(folder))
    for name in sorted(names):
        text = f"{os.path.splitext(name)[0]}.txt"
        if _is_picture(name) and text in names:
            caption = _one_line((folder / text).read_bytes())
            if caption:
                yield Entry(caption, name)


def _of_shard(path: Path) -> Iterator[Entry]:
    """Members of one sample follow each other and share a name up to the first dot."""
    key, caption, picture = "", "", None
    try:
        with tarfile.open(path) as shard:
            for member in shard:
                name = PurePosixPath(member.name)
                stem, _, extension = name.name.partition(".")
                if str(name.parent / stem) != key:
                    if caption and picture:
                        yield _member_entry(caption, picture)
                    key, caption, picture = str(name.parent / stem), "", None
                if f".{extension}".lower() in IMAGE_SUFFIXES and member.isreg():
                    picture = member
                elif extension in ("txt", "json") and not caption:
                    file = shard.extractfile(member)
                    content = file.read() if file else b""
                    caption = _one_line(content) if extension == "txt" else _json_caption(content)
            if caption and picture:
                yield _member_entry(caption, picture)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise DataError(
            f"The shard {path} cannot be read ({error}). Download it again, or move it away."
        ) from error


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
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        captions = next((name for name in _CAPTION_COLUMNS if name in names), "")
        places = next((name for name in (*_PATH_COLUMNS, _KEY_COLUMN) if name in names), "")
        if not captions or not places:
            raise DataError(
                f"The table {path} has the columns {', '.join(names)}. Needed are one of "
                f"{', '.join(_CAPTION_COLUMNS)} and one of "
                f"{', '.join((*_PATH_COLUMNS, _KEY_COLUMN))}, which say what a picture shows and "
                f"where it lies. A table of web addresses alone must be downloaded first."
            )
        pictures = _pictures_by_key(path) if places == _KEY_COLUMN else None
        for batch in table.iter_batches(columns=[captions, places]):
            for row in batch.to_pylist():
                where = pictures.get(str(row[places])) if pictures is not None else row[places]
                if row[captions] and where:
                    yield Entry(" ".join(str(row[captions]).split()), str(where))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"The table {path} cannot be read ({error}). Download it again, or move it away."
        ) from error


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
    """Crawled captions are not always UTF-8; one letter more or less does not change a search."""
    return " ".join(content.decode("utf-8-sig", errors="replace").split())


def _json_caption(content: bytes) -> str:
    sample = json.loads(content)
    caption = sample.get("caption") if isinstance(sample, dict) else None
    return " ".join(caption.split()) if isinstance(caption, str) else ""
