"""What a piece of code costs, or leaves behind, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PEAK = """
import sys
def peak_mb():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1e3
"""


def run_python(code: str, **environment: str) -> str:
    """Runs code that can import the pack, and ask `peak_mb()`; returns what it prints."""
    start = f"{_PEAK}\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport conftest\n"
    result = subprocess.run(
        [sys.executable, "-c", start + code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
