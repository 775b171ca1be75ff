"""Size against alignment (the paper's Fig. 13) in miniature:
`python -m custom_diffusion.miniature.compression_curve`.

Each concept is taught once and cut to several sizes. What is left of it is scored as in the
benchmark.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

from ..compression.ranks import compress
from ..concept.atomic import write_atomically, write_text_atomically
from ..concept.concept import Concept
from ..concept.file import read_concept, write_concept
from ..pictures.plot import COLOURS, Axis, Series, line_plot
from .cells import markdown_table
from .laboratory import Laboratory, pair_of_subjects
from .model import EVERY_WORD

RANKS = (1, 2, 4, 8, 16, 32)
"""Sizes are those of these ranks in every layer, so that each rank is compared with the best choice
of the same size."""
WHOLE, EQUAL, GLOBAL = "whole", "one rank for all", "ranks by energy"
_COLUMNS = {
    "file, kB": ("kilobytes", 0),
    "energy": ("energy_kept", 3),
    "relative error": ("relative_error", 3),
    "text alignment": ("text_alignment", 3),
    "image alignment": ("image_alignment", 3),
}


@dataclass(frozen=True)
class Point:
    """A concept at one size."""

    way: str
    rank: int
    """In every layer; 0 of a whole one"""
    kilobytes: float
    """Of its file"""
    energy_kept: float
    text_alignment: float
    image_alignment: float

    @property
    def relative_error(self) -> float:
        """‖ΔW − approximation‖ over ‖ΔW‖, of all layers together"""
        return math.sqrt(1 - self.energy_kept)

    @property
    def name(self) -> str:
        return f"{self.way}, {self.rank}" if self.rank else self.way


def curve(lab: Laboratory, number: int, seed: int, ranks: Sequence[int], steps: int) -> list[Point]:
    """Teaches concept `number` and scores it whole and at the size of every rank."""
    return list(_points(lab, number, seed, ranks, steps))


def _points(
    lab: Laboratory, number: int, seed: int, ranks: Sequence[int], steps: int
) -> Iterator[Point]:
    subject, _ = pair_of_subjects(number, seed)
    concept = lab.teach([subject], replace(EVERY_WORD, seed=seed, steps=steps))

    def point(way: str, rank: int, small: Concept, energy_kept: float) -> Point:
        saved, size = _through_a_file(small)
        score = lab.score([subject], saved, seed)
        return Point(
            way, rank, size / 1e3, energy_kept, score.text_alignment, score.image_alignment
        )

    yield point(WHOLE, 0, concept, 1.0)
    for rank in ranks:
        small, report = compress(concept, rank=rank)
        yield point(EQUAL, rank, small, report.energy_kept)
        small, report = compress(concept, megabytes=report.bytes_after / 1e6)
        yield point(GLOBAL, rank, small, report.energy_kept)


def _through_a_file(concept: Concept) -> tuple[Concept, int]:
    """As it is read back from half precision, and the size of the file in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_concept(concept, Path(folder) / "concept.safetensors")
        return read_concept(path), path.stat().st_size


def save_picture(points: Sequence[Point], path: Path) -> None:
    """Means over the concepts: alignment against size, both ways to choose ranks."""
    lines = []
    for measure, colour in (("text", COLOURS[0]), ("image", COLOURS[1])):
        for way in (GLOBAL, EQUAL):
            sizes = sorted({point.rank for point in points if point.way == way})
            groups = [[p for p in points if p.way == way and p.rank == rank] for rank in sizes]
            groups.append([point for point in points if point.way == WHOLE])
            means = [
                (
                    mean(point.kilobytes for point in group),
                    mean(float(getattr(point, f"{measure}_alignment")) for point in group),
                )
                for group in groups
            ]
            lines.append(
                Series(f"{measure}, {way}", means, colour, dashed=way == EQUAL, marks=means)
            )
    picture = line_plot(
        "What is left of a concept at a smaller size",
        Axis("size of the file, kB", log=True),
        Axis("alignment; on the right the whole concept", low=0, high=1),
        lines,
        width=760,
    )
    write_atomically(path, lambda temporary: picture.save(temporary, "PNG", optimize=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concept-seed", type=int, default=0, help="first concept")
    parser.add_argument("--concepts", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the trainings")
    parser.add_argument("--steps", type=int, default=EVERY_WORD.steps)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--pictures", type=int, default=3, help="for each prompt")
    parser.add_argument("--json", type=Path, help="write the scores here")
    parser.add_argument("--picture", type=Path, help="write the plot here, as a PNG")
    given = parser.parse_args(arguments)
    lab = Laboratory(pictures_per_prompt=given.pictures)
    points = []
    for number in range(given.concept_seed, given.concept_seed + given.concepts):
        points += curve(lab, number, given.seed, given.ranks, given.steps)
    print(markdown_table("concept", [(point.name, point) for point in points], _COLUMNS))
    if given.json:
        write_text_atomically(given.json, json.dumps([asdict(p) for p in points], indent=1))
    if given.picture:
        save_picture(points, given.picture)


if __name__ == "__main__":
    main()
