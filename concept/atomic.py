"""Files that are complete or absent: written beside their place, flushed to disk, then renamed."""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from .errors import ConceptFileError

BeforeNaming = Callable[[Path], None]
"""What is done with a complete file before it has its name"""


def nothing(temporary: Path) -> None:
    """Before a file gets its name"""


def write_atomically(
    path: Path,
    write: Callable[[Path], object],
    expected_bytes: int = 0,
    *,
    replace: bool = True,
    before_naming: BeforeNaming = nothing,
) -> None:
    """Calls `write` with a temporary path in the same folder and renames the result to `path`.

    Whatever happens, `path` holds either its old content or the complete new one, and no temporary
    file is left. `before_naming` gets the complete temporary file. Raises ConceptFileError when the
    disk is full or the folder cannot be written, and FileExistsError when `path` exists and must
    not be replaced.
    """
    # Without the name of the file, which may be as long as a name can be.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    taken = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _usual_mode(temporary)
        write(temporary)
        temporary.chmod(mode)  # safetensors' files are their owner's alone, whatever the umask says
        _flush_to_disk(temporary)
        before_naming(temporary)
        if replace:
            os.replace(temporary, path)
        else:
            taken = not _publish(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ConceptFileError(_not_written(path, error, expected_bytes)) from error
    finally:
        if os.path.exists(temporary):  # False, not an error, where the path itself is impossible
            temporary.unlink()
    if taken:
        raise FileExistsError(path)


def try_place(path: Path) -> None:
    """Writes an empty file and removes it again, so that a result which takes hours is not made for
    a place where nothing can be written.

    Folders on the way are made, and stay. Raises ConceptFileError with the cause, and
    FileExistsError where something is there already.
    """
    write_atomically(path, lambda temporary: temporary.touch(), replace=False)
    path.unlink()


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` for a UTF-8 text."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """`write_atomically` for bytes in memory."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content), len(content))


def _not_written(path: Path, error: OSError | SafetensorError, expected_bytes: int) -> str:
    """The cause, and what helps against it."""
    reason, number = str(error), None
    if isinstance(error, OSError):
        reason, number = error.strerror or reason, error.errno
    elif found := re.search(r"(?:os error|code:) (\d+)", reason):  # Rust's words, new and old
        number = int(found[1])
    file = next((p for p in path.parents if os.path.lexists(p) and not os.path.isdir(p)), None)
    if file:
        advice = f"{file} is no folder: move it away or choose another folder"
    elif number == errno.ENAMETOOLONG:
        advice = f"The name has {len(os.fsencode(path.name))} bytes: choose a shorter one"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = f"Give yourself permission to write in {path.parent}, or choose another folder"
    elif number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "Free some space or choose another folder"
    else:
        advice = "Choose another folder"
    size = (
        f": about {expected_bytes / 1e6:.1f} MB were needed, "
        f"{_free_bytes(path.parent) / 1e6:.1f} MB are free on that disk"
    )
    return (
        f"{path} could not be written ({reason}){size if expected_bytes else ''}. {advice}; "
        f"nothing half-written was left."
    )


def _usual_mode(path: Path) -> int:
    """Who may read and write a file that is made at this path in the ordinary way."""
    path.touch()
    mode = path.stat().st_mode
    path.unlink()
    return mode


def _publish(temporary: Path, path: Path) -> bool:
    """Gives the file its name unless something has it: also when two processes try at once."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        os.rename(temporary, path)
    return True


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _free_bytes(folder: Path) -> int:
    existing = next(p for p in (folder, *folder.parents) if os.path.isdir(p))
    return shutil.disk_usage(existing).free
