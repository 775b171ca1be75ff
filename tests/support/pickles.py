"""PyTorch archives of any pickle: what torch.save would not write."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path


def write_archive(
    path: Path, text: bytes, storages: Mapping[str, bytes] | None = None, order: bytes = b"little"
) -> Path:
    """An archive of the pickle `text` and of storages by key."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", text)
        archive.writestr("archive/byteorder", order)
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
    return path


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if abs(value) < 1 << 31 else long(value)


def long(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(content) < 256:
        return b"\x8a" + bytes([len(content)]) + content
    return b"\x8b" + struct.pack("<i", len(content)) + content


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def storage(key: str = "0", numbers: int = 4, kind: str = "FloatStorage") -> bytes:
    parts = text("storage") + name("torch", kind) + text(key) + text("cpu") + number(numbers)
    return b"(" + parts + b"tQ"


def sizes(*values: int) -> bytes:
    return b"(" + b"".join(number(value) for value in values) + b"t"


def tensor(
    shape: bytes = sizes(4), strides: bytes = sizes(1), offset: int = 0, source: bytes = b""
) -> bytes:
    arguments = (source or storage()) + number(offset) + shape + strides + b"\x89}"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def pickled(value: bytes) -> bytes:
    """{"<new1>": value}"""
    return b"\x80\x02}" + text("<new1>") + value + b"s."
