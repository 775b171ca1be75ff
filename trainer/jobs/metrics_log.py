"""The metrics of a job, a line a step, and which step they say is the best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TextIO

from ...concept.atomic import write_text_atomically
from .records import LINE_BYTES, MetricsLine

_AVERAGED_STEPS = 50
"""Single steps say little."""


class MetricsLog:
    """A file of lines, which may not be there yet."""

    def __init__(self, path: Path, most_lines: Callable[[], int]) -> None:
        self._path, self._most_lines = path, most_lines
        self._file: TextIO | None = None

    @contextmanager
    def after(
        self, losses: Sequence[float], validation: Mapping[int, float] | None = None
    ) -> Iterator[None]:
        """While the context lasts `add` can be called. Before that the lines are as a run had them
        that has come so far: later ones are dropped, lost ones made again.
        """
        lines = list(islice(self.lines(), len(losses)))
        for step in range(len(lines) + 1, len(losses) + 1):
            lines.append(MetricsLine(step, losses[step - 1], None, (validation or {}).get(step)))
        write_text_atomically(self._path, "".join(f"{line.as_json()}\n" for line in lines))
        with open(self._path, "a", encoding="utf-8") as self._file:
            yield
        self._file = None

    def add(self, step: int, loss: float, validation: float | None = None) -> None:
        assert self._file is not None, "`after` comes first"
        line = MetricsLine(step, loss, round(time.time(), 3), validation)
        self._file.write(f"{line.as_json()}\n")
        self._file.flush()

    def lines(self) -> Iterator[MetricsLine]:
        """Up to the first that is no metrics line: a killed process may have left half of one."""
        if not self._path.is_file():
            return
        with open(self._path, "rb") as file:
            for step in range(1, self._most_lines() + 1):
                try:
                    line = MetricsLine.parse(file.readline(LINE_BYTES))
                except ValueError:
                    return
                if line.step != step:
                    return
                yield line

    def loss_by(self) -> Callable[[int], float]:
        """Step -> the loss that tells how good it is: the newest that was measured on pictures kept
        back, where any was; else the mean of up to 50 steps.
        """
        lines = list(self.lines())
        validation = measured(lines)

        def loss(step: int) -> float:
            if validation:
                newest = max((known for known in validation if known <= step), default=None)
                return float("inf") if newest is None else validation[newest]
            before = [line.loss for line in lines[max(step - _AVERAGED_STEPS, 0) : step]]
            return statistics.fmean(before or [float("inf")])

        return loss


def measured(lines: Iterable[MetricsLine]) -> dict[int, float]:
    """Losses on pictures that are kept back, by step."""
    return {line.step: line.validation for line in lines if line.validation is not None}
