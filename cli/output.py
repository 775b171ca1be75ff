"""What commands show while they work, and what they say about files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from ..concept.concept import Concept
from ..concept.errors import ConceptFileError
from ..concept.file import write_concept


def progress(bar: tqdm[None]) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return show


def check_new(output: Path) -> None:
    if output.exists():
        raise ConceptFileError(
            f"{output} exists already. Choose another --output, or move it away."
        )


def save(concept: Concept, path: Path) -> None:
    write_concept(concept, path)
    print(f"saved {path} ({path.stat().st_size / 1e6:.1f} MB): {concept.describe()}")
