"""Files that are complete or absent: written beside their place, flushed to disk, then renamed."""

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from .errors import ConceptFileError


def write_atomically(
    path: Path,
    write: Callable[[Path], object],
    expected_bytes: int = 0,
    *,
    replace: bool = True,
) -> None:
    """Calls `write` with a temporary path in the same folder and renames the result to `path`.

    Whatever happens, `path` holds either its old content or the complete new one, and no temporary
    file is left. Raises ConceptFileError when the disk is full or the folder cannot be written, and
    FileExistsError when `path` exists and must not be replaced.
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
        if replace:
            os.replace(temporary, path)
        else:
            taken = not _publish(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConceptFileError(
            f"{path} could not be written ({reason}): about "
            f"{expected_bytes / 1e6:.1f} MB were needed, {_free_bytes(path.parent) / 1e6:.1f} MB "
            "are free on that disk. Free some space or choose another folder; nothing "
            "half-written was left."
        ) from error
    finally:
        if os.path.exists(temporary):  # False, not an error, where the path itself is impossible
            temporary.unlink()
    if taken:
        raise FileExistsError(path)


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` for a UTF-8 text."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """`write_atomically` for bytes in memory."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content), len(content))


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
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    return shutil.disk_usage(existing).free
