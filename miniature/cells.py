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

Row = TypeVar("Row")
Scores = TypeVar("Scores")


def run_cells(
    run_cell: Callable[[int, int], list[Row]],
    numbers: Sequence[int],
    seeds: Sequence[int],
    processes: int,
    on_rows: Callable[[list[Row]], None],
) -> list[Row]:
    """All rows of `run_cell(number, seed)`, one thread each; `on_rows` sees them grow."""
    rows: list[Row] = []
    with (
        ProcessPoolExecutor(processes, get_context("spawn"), initializer=_one_thread) as pool,
        tqdm(total=len(numbers) * len(seeds), desc="concepts × seeds", unit="cell") as bar,
    ):
        cells = [pool.submit(run_cell, number, seed) for seed in seeds for number in numbers]
        for cell in as_completed(cells):
            rows += cell.result()
            bar.update()
            on_rows(rows)
    return rows


def options(description: str | None, *, concept_seed: int, seeds: int) -> argparse.Namespace:
    """The command line of an experiment, with its defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--concept-seed", type=int, default=concept_seed, help="first concept")
    parser.add_argument("--concepts", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=seeds, help="trainings of each")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write every score to this file, too")
    return parser.parse_args()


def run_command(
    given: argparse.Namespace, run_cell: Callable[[int, int], list[tuple[str, str, Scores]]]
) -> list[tuple[str, str, Scores]]:
    """Runs the cells that the options ask for; the file grows with them."""

    def report(rows: list[tuple[str, str, Scores]]) -> None:
        if given.json:
            scores = [{"table": t, "name": n, **asdict(s)} for t, n, s in rows]  # type: ignore[call-overload]
            given.json.write_text(json.dumps(scores, indent=1))

    numbers = range(given.concept_seed, given.concept_seed + given.concepts)
    return run_cells(run_cell, numbers, range(given.seeds), given.processes, report)


def markdown_table(
    title: str, rows: Iterable[tuple[str, object]], columns: Mapping[str, tuple[str, int]]
) -> str:
    """Mean and deviation over the cells; rows are (name, scores), columns (field, digits)."""
    grouped: dict[str, list[object]] = {}
    for name, scores in rows:
        grouped.setdefault(name, []).append(scores)
    lines = [f"| {' | '.join([title, *columns])} |", "|---" * (len(columns) + 1) + "|"]
    for name, scores in grouped.items():
        cells = [name]
        for field, digits in columns.values():
            values = [float(getattr(score, field)) for score in scores]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _one_thread() -> None:
    torch.set_num_threads(1)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
