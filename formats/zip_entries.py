"""Where the entries of a stranger's zip lie, if it is one that PyTorch wrote: not compressed, each
in bytes of its own.
"""

from __future__ import annotations

import struct
import zipfile
from typing import BinaryIO, NamedTuple

STRUCTURE = "/data.pkl"
"""How the entry ends that says what PyTorch's others are"""
_LARGEST_DIRECTORY = 8 << 20
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class OtherZipError(ValueError):
    """A zip of anything; says what it holds and what to do."""


class Entry(NamedTuple):
    """Bytes of a file."""

    start: int
    size: int


class _Frugal:
    """A file of which not much is read at once. zipfile reads a whole directory, of any size."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int = -1) -> bytes:
        content = self._read(size if 0 <= size <= _LARGEST_DIRECTORY else _LARGEST_DIRECTORY + 1)
        if len(content) > _LARGEST_DIRECTORY:
            raise zipfile.BadZipFile("its directory is too large")
        return content


def read_entries(file: BinaryIO, file_bytes: int) -> dict[str, Entry]:
    """Name → where its bytes are, which no other entry has. Raises ValueError, OtherZipError for a
    zip that PyTorch did not write.
    """
    try:
        with zipfile.ZipFile(_Frugal(file)) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OverflowError) as error:
        raise ValueError(f"its end is missing or damaged ({error})") from error
    if not any(info.filename.endswith(STRUCTURE) for info in listed):
        held = ", ".join(info.filename[:100] for info in listed[:3]) or "nothing"
        raise OtherZipError(
            f"it is a zip file, but not one that PyTorch wrote: it holds {held}. Unpack it, and "
            f"give what was in it"
        )
    entries: dict[str, Entry] = {}
    end = 0
    for info in sorted(listed, key=lambda info: info.header_offset):
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError("it is a zip file, but PyTorch's entries are not compressed")
        if info.header_offset < end or info.flag_bits & 1:
            raise ValueError("entries of the zip share bytes, or are encrypted")
        local = read_entry(file, Entry(info.header_offset, _LOCAL_HEADER.size))
        if len(local) < _LOCAL_HEADER.size or not local.startswith(b"PK\x03\x04"):
            raise ValueError("an entry of the zip is not where its directory says")
        _, name, extra = _LOCAL_HEADER.unpack(local)
        start = info.header_offset + _LOCAL_HEADER.size + name + extra
        end = start + info.file_size
        if end > file_bytes or info.filename in entries:
            raise ValueError("an entry of the zip is there twice, or beyond its end")
        entries[info.filename] = Entry(start, info.file_size)
    return entries


def read_entry(file: BinaryIO, entry: Entry) -> bytes:
    """Its bytes, fewer where the file ends before it."""
    file.seek(entry.start)
    return file.read(entry.size)
