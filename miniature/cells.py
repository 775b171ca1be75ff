"""Runs an experiment over concepts and seeds, several at a time, and makes tables of the scores."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TypeVar

import torch
from tqdm import tqdm

Row = TypeVar("Row")


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
