"""What the registry ships of this repository: the tracked files that .comfyignore does not name."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def shipped_files() -> list[str]:
    """Paths below the root of the repository, in order; with .gitignore's rules, as the registry's
    own client applies them.
    """
    ignored = set(_tracked("--cached", "--ignored", "--exclude-from=.comfyignore"))
    return [name for name in _tracked() if name not in ignored]


def _tracked(*options: str) -> list[str]:
    command = ["git", "ls-files", "-z", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(filter(None, done.stdout.split("\0")))


def write_archive(path: Path) -> Path:
    """The archive as it is published."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in shipped_files():
            archive.write(ROOT / name, name)
    return path
