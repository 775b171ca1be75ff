"""The files of the pack itself, for tests that walk over them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE_THE_PACK = {"tests", "benchmarks", "docs", "web", "example_workflows", "locales"}


def pack_files() -> list[Path]:
    return sorted(
        path
        for path in ROOT.rglob("*.py")
        if (inside := path.relative_to(ROOT).parts)
        and inside[0] not in OUTSIDE_THE_PACK
        and not any(part.startswith(".") or part in ("build", "dist") for part in inside)
    )
