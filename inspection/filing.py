"""Another name for a concept's file, and the bin: what is deleted can be moved back by hand.

The pictures beside the file go with it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

from ..concept.errors import ConceptFileError
from ..concept.naming import safe_file_name
from .card import PICTURES

BIN = "bin"
BINNED = ".deleted"
"""Ends the names in the bin, so that nobody takes what lies there for a model."""


def rename_concept(path: Path, name: str) -> Path:
    """Gives a file of a concept the name that one saved as `name` would have; it stays in its
    folder and keeps its ending. Returns its new path.

    Raises ConceptFileError where that name is taken, and where the system does not allow it.
    """
    target = path.with_name(safe_file_name(name) + path.suffix)
    if target != path:
        _move(path, target, lambda picture: target.stem + picture.name[len(path.stem) :])
    return target


def bin_concept(path: Path) -> Path:
    """Moves a file of a concept into the folder `bin` beside it. Returns where it is then.

    Raises ConceptFileError where the system does not allow it.
    """
    folder = path.parent / BIN
    for number in itertools.count(1):
        stem = path.stem if number == 1 else f"{path.stem}-{number}"
        target = folder / f"{stem}{path.suffix}{BINNED}"
        if not os.path.lexists(target):
            break
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise _not_moved(path, error) from error
    _move(path, target, lambda picture: f"{stem}{picture.name[len(path.stem) :]}{BINNED}")
    return target


def _move(path: Path, target: Path, picture_name: Callable[[Path], str]) -> None:
    if os.path.lexists(target) and not _same_file(path, target):
        raise ConceptFileError(
            f"There is already a {target.name} beside {path.name}. Choose another name."
        )
    pictures = [path.with_suffix(suffix) for suffix in PICTURES]
    try:
        os.rename(path, target)
        for picture in pictures:
            if os.path.lexists(picture):
                os.rename(picture, target.parent / picture_name(picture))
    except OSError as error:
        raise _not_moved(path, error) from error


def _same_file(path: Path, target: Path) -> bool:
    """Where capital letters do not count, another writing of a name is the same file."""
    return os.path.samefile(path, target)


def _not_moved(path: Path, error: OSError) -> ConceptFileError:
    return ConceptFileError(
        f"{path.name} could not be moved ({error.strerror}). Close the program that has it open, "
        f"or look at the permissions of its folder, and try again."
    )
