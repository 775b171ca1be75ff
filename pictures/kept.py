"""Folders of pictures that a model draws: named after all that the pictures depend on, never mixed
with others, and gone on with where they were interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..concept.atomic import write_atomically, write_text_atomically
from ..concept.errors import DataError
from .tensors import to_picture

SETTINGS_FILE = "settings.json"


def settings_hash(settings: Mapping[str, Any]) -> str:
    """A short name for the pictures that these settings give."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes a folder one for pictures of these settings, or checks that it is."""
    note = folder / SETTINGS_FILE
    wanted = json.dumps(settings, sort_keys=True, indent=1)
    if note.is_file():
        if note.stat().st_size != len(wanted) or note.read_bytes() != wanted.encode():
            raise DataError(
                f"{folder} holds pictures that were made with other settings ({note.name} there "
                f"has them). Choose another folder, or use the same settings to resume."
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise DataError(
            f"{folder} holds files that were not made here. Choose a new or an empty folder."
        )
    else:
        write_text_atomically(note, wanted)


def save_picture(path: Path, image_hwc: Tensor) -> None:
    """A picture (h, w, 3) in 0..1 as a PNG, complete or absent."""
    write_atomically(path, partial(to_picture(image_hwc).save, format="PNG"))
