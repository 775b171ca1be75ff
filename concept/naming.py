"""Names of files that are made of what people write, harmless on every file system."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

THUMBNAIL = ".preview.png"
"""`my-cat.preview.png` beside `my-cat.safetensors`, where ComfyUI and its model managers look."""
_HARMLESS = ".-_"
_MOST_BYTES = 100
"""Of the 255 that a name may have, so that a number, an ending or a hash fits beside it"""
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.I | re.S)
"""What Windows takes for a device, whatever ending follows"""


def safe_file_name(name: str) -> str:
    """The name with everything but letters, their accents, digits, '.', '-' and '_' replaced; at
    most 100 bytes, and never empty.

    An accent is composed with its letter where Unicode has both as one. Different names may become
    one: whoever writes a file adds a number where the name is taken, as `write_new` does.
    """
    kept = ""
    for character in unicodedata.normalize("NFC", name.strip()):
        accent = unicodedata.category(character)[0] == "M" and kept[-1:] not in _HARMLESS
        kept += character if character.isalnum() or character in _HARMLESS or accent else "-"
    kept = kept.strip(".-")
    kept = f"_{kept}" if _RESERVED.fullmatch(kept) else kept
    return kept.encode()[:_MOST_BYTES].decode(errors="ignore").rstrip(".-") or "concept"


def write_new(folder: Path, name: str, write: Callable[[Path], Path]) -> Path:
    """Lets `write` write the first of `folder/name.safetensors`, `name-2` and so on that is free.

    `write` must raise FileExistsError where somebody else was quicker.
    """
    stem = safe_file_name(name)
    for number in itertools.count(1):
        path = folder / f"{stem}{'' if number == 1 else f'-{number}'}.safetensors"
        if path.exists():
            continue
        try:
            return write(path)
        except FileExistsError:
            continue
    raise AssertionError("unreachable")
