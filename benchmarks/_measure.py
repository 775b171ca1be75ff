"""What every benchmark shares: its options, interleaved timing, and how results are written.

Times on a shared machine drift, so competitors take turns within one process, and a ratio is the
median of the ratios of neighbouring turns, never the ratio of two separate medians.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def options(description: str, *, threads: int, rounds: int) -> argparse.ArgumentParser:
    """The options of every benchmark; `threads` and `rounds` are its defaults."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=threads, help="CPU threads of torch")
    parser.add_argument("--rounds", type=int, default=rounds, help="turns that each one gets")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    return parser


@dataclass(frozen=True)
class Times:
    """Seconds of each competitor, round by round."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, slower: str, faster: str) -> float:
        """How many times faster `faster` is: the median of the ratios within each round."""
        pairs = zip(self.seconds[slower], self.seconds[faster], strict=True)
        return statistics.median(slow / fast for slow, fast in pairs)


def interleaved(competitors: Mapping[str, Callable[[], object]], rounds: int) -> Times:
    """Lets the competitors take turns, after one turn each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for round_ in range(rounds + 1):
        for name, run in competitors.items():
            start = time.perf_counter()
            run()
            if round_ > 0:
                seconds[name].append(time.perf_counter() - start)
    return Times(seconds)


def peak_memory_gib() -> float:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (30 if sys.platform == "darwin" else 20)  # bytes there, KiB on Linux


def write_json(path: Path | None, results: Mapping[str, Any]) -> None:
    """Writes the results with the versions and the number of threads they were measured with."""
    if path is None:
        return
    setting = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    path.write_text(json.dumps({"setting": setting, **results}, indent=2) + "\n", encoding="utf-8")
