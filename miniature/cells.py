"""Runs an experiment over concepts and seeds, several at a time, and makes tables of the scores."""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from ..concept.atomic import write_text_atomically

Scores = TypeVar("Scores")
Row = tuple[str, str, Scores]
"""Table, method and scores"""
Cell = tuple[int, int]
"""Number of the concept, seed of the training"""

_SKEWED = {"drift"}  # one odd picture can multiply it by a hundred


def run_cells(
    run_cell: Callable[[int, int], list[Row[Scores]]],
    cells: Sequence[Cell],
    processes: int,
    done: Mapping[Cell, list[Row[Scores]]],
    on_cell: Callable[[Mapping[Cell, list[Row[Scores]]]], None],
) -> dict[Cell, list[Row[Scores]]]:
    """`run_cell` of every cell that is not done, one thread each; `on_cell` sees them grow."""
    results = {cell: rows for cell, rows in done.items() if cell in cells}
    with (
        ProcessPoolExecutor(processes, get_context("spawn"), initializer=_one_thread) as pool,
        tqdm(total=len(cells), initial=len(results), desc="concepts × seeds", unit="cell") as bar,
    ):
        running = {pool.submit(run_cell, *cell): cell for cell in cells if cell not in results}
        for cell in as_completed(running):
            results[running[cell]] = cell.result()
            bar.update()
            on_cell(results)
    return {cell: results[cell] for cell in cells}


def options(
    description: str | None,
    *,
    concept_seed: int,
    seeds: int,
    more: Sequence[argparse.ArgumentParser] = (),
) -> argparse.Namespace:
    """The command line of an experiment, with its defaults."""
    parser = argparse.ArgumentParser(description=description, parents=more)
    parser.add_argument("--concept-seed", type=int, default=concept_seed, help="first concept")
    parser.add_argument("--concepts", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=seeds, help="trainings of each")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="keep scores here: a run that is ended goes on")
    return parser.parse_args()


def run_command(
    given: argparse.Namespace,
    run_cell: Callable[[int, int], list[Row[Scores]]],
    scores: Callable[..., Scores],
) -> list[Row[Scores]]:
    """Runs the cells that the options ask for, and keeps them in the file as they come.

    Those that are there already, of a run that was ended, are not run again; `scores` makes them.
    """
    done: dict[Cell, list[Row[Scores]]] = {}
    if given.json and given.json.is_file():
        for cell in json.loads(given.json.read_text()):
            rows = [(t, name, scores(**values)) for t, name, values in cell["rows"]]
            done[cell["concept"], cell["seed"]] = rows

    def keep(results: Mapping[Cell, list[Row[Scores]]]) -> None:
        if given.json:
            written = [
                {"concept": c, "seed": s, "rows": [(t, n, asdict(v)) for t, n, v in rows]}  # type: ignore[call-overload]
                for (c, s), rows in results.items()
            ]
            write_text_atomically(given.json, json.dumps(written, indent=1))

    numbers = range(given.concept_seed, given.concept_seed + given.concepts)
    cells = [(number, seed) for seed in range(given.seeds) for number in numbers]
    results = run_cells(run_cell, cells, given.processes, done, keep)
    return [row for rows in results.values() for row in rows]


def markdown_table(
    title: str, rows: Iterable[tuple[str, object]], columns: Mapping[str, tuple[str, int]]
) -> str:
    """Mean and deviation over the cells; rows are (name, scores), columns (field, digits).

    Of what is skewed, median and (largest).
    """
    grouped: dict[str, list[object]] = {}
    for name, scores in rows:
        grouped.setdefault(name, []).append(scores)
    lines = [f"| {' | '.join([title, *columns])} |", "|---" * (len(columns) + 1) + "|"]
    for name, scores in grouped.items():
        cells = [name]
        for field, digits in columns.values():
            values = [float(getattr(score, field)) for score in scores]
            if field in _SKEWED:
                cells.append(f"{statistics.median(values):.{digits}f} ({max(values):.{digits}f})")
                continue
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _one_thread() -> None:
    torch.set_num_threads(1)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
