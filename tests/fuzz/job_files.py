"""Looks for folders of jobs that break the list of them: `python tests/fuzz/job_files.py SECONDS
[SEED]`, in an environment with this package.

Every round is a folder with one good job and some odd ones: files of a good job whose values are
replaced by odd ones, cut, flipped, or random bytes, and names that are no names. Looking at a job
may raise an error of ours. Everything else is a finding: another exception, an answer that is no
JSON, a job that is not listed, a good one that is not as it was, or a round of more than 20 s.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ is None and "custom_diffusion" not in sys.modules:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import conftest  # noqa: F401  (makes the package importable)

import torch
from custom_diffusion.concept.errors import CheckpointError, JobError
from custom_diffusion.trainer import checkpoint
from custom_diffusion.trainer.jobs.job import Job
from custom_diffusion.trainer.jobs.records import Description, MetricsLine, Outcome
from custom_diffusion.trainer.jobs.service import TrainingService
from custom_diffusion.trainer.jobs.snapshot import JobState
from safetensors.torch import save_file
from support.odd_jobs import GOOD, OLD_JOB

_ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, 5e-324),
    *(float("nan"), float("inf"), "", "a", "\0", "\ud800", "５", "\u202e", "x" * 5000, "../../a"),
    *([], {}, [[]], {"": {}}, [None] * 50, {"a": [1, {"b": "\udfff"}]}),
)
_ODD_NAMES = ("５.safetensors", "-1.safetensors", "9" * 180 + ".png", "1.png", ".safetensors", "²")
_KINDS = ("checkpoints", "concepts", "samples")
_LIMIT_S = 20
_RECORDS: tuple[tuple[str, Callable[[bytes], Description | Outcome | MetricsLine]], ...] = (
    ("job.json", Description.parse),
    ("outcome.json", Outcome.parse),
    ("metrics.jsonl", MetricsLine.parse),
)


def odd_value(rng: random.Random, depth: int = 0) -> Any:
    if depth < 3 and rng.random() < 0.2:
        values = [odd_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        return values if rng.random() < 0.5 else {str(n): value for n, value in enumerate(values)}
    if rng.random() < 0.2:
        return rng.choice([rng.randrange(-(2**70), 2**70), rng.gauss(0, 1e10), deep(rng)])
    return rng.choice(_ODD_VALUES)


def deep(rng: random.Random) -> Any:
    value: Any = 1
    for _ in range(rng.choice([50, 98, 99, 100, 101, 400])):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def change_values(rng: random.Random, path: Path) -> None:
    """Replaces, adds or removes some values of a JSON file, or of a line of several."""
    text = (OLD_JOB / path.name).read_text(encoding="utf-8")
    lines = text.splitlines() if path.suffix == ".jsonl" else None
    row = rng.randrange(len(lines)) if lines else 0
    values = json.loads(lines[row] if lines else text)
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice([*values, "name", "steps", "state", "notes"])
        if rng.random() < 0.15:
            values.pop(name, None)
        else:
            values[name] = odd_value(rng)
    text = json.dumps(values)
    if lines:
        lines[row] = text
    path.write_text("\n".join(lines) if lines else text)


def change_bytes(rng: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.randrange(1, 6)):
        place = rng.randrange(len(content) + 1)
        change = rng.randrange(4)
        if change == 0:
            content[place : place + 1] = rng.randbytes(1)
        elif change == 1:
            del content[place : place + rng.choice([1, 9, 10**6])]
        elif change == 2:
            content[place:place] = rng.choice(
                [b"[" * 3000, b'"', b"\0", b"9" * 400, b"\xed\xa0\x80"]
            )
        else:
            content[place:place] = rng.randbytes(rng.randrange(20))
    path.write_bytes(content)


def odd_checkpoint(rng: random.Random, path: Path) -> None:
    """Its digest is right: whoever makes it knows how that is computed."""
    names = ("losses", "parameter.0", "parameter.1", "step.0", "step.-1", "a", "", "x.9", "p.²")
    dtypes = (torch.float64, torch.float32, torch.int64, torch.bool, torch.float8_e4m3fn)
    tensors = {
        name: torch.full(rng.choice([(), (0,), (3,), (1, 2)]), rng.choice([0, 1])).to(
            rng.choice(dtypes)
        )
        for name in rng.sample(names, rng.randrange(1, 6))
    }
    if rng.random() < 0.6:
        value = rng.choice([0.5, float("nan"), 1e300])
        tensors["losses"] = torch.full((rng.randrange(5),), value, dtype=torch.float64)
    metadata = {"format": checkpoint.FORMAT, "format_version": checkpoint.FORMAT_VERSION}
    if rng.random() < 0.8:
        counts = ("0", "1", "2", "-1", "a", "²", "9" * 5000, "999999999", "")
        metadata["parameters"] = rng.choice(counts)
    metadata["digest"] = checkpoint._digest(metadata, tensors)
    save_file(tensors, path, metadata)


def make_odd(rng: random.Random, folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice(files)
    kind = rng.random()
    if kind < 0.5 and path.suffix in (".json", ".jsonl"):
        change_values(rng, path)
    elif kind < 0.65 and (folder / "checkpoints").is_dir():
        odd_checkpoint(rng, folder / "checkpoints" / f"{rng.randrange(5, 10**6):09}.safetensors")
    elif kind < 0.85:
        change_bytes(rng, path)
    elif kind < 0.9:
        path.write_bytes(rng.randbytes(rng.randrange(300)))
    elif kind < 0.95:
        odd = folder / rng.choice(_KINDS) / rng.choice(_ODD_NAMES)
        odd.parent.mkdir(exist_ok=True)
        odd.write_bytes(rng.randbytes(9))
    else:
        path.unlink()
        if rng.random() < 0.5:
            path.mkdir()


def look_at(job: Job) -> None:
    """Raises JobError or CheckpointError at most."""
    snapshot = job.snapshot()
    assert isinstance(snapshot.state, JobState)
    json.dumps(snapshot.as_json(), allow_nan=False, ensure_ascii=False).encode()
    described = job.folder.description
    json.dumps(described.content, allow_nan=False, ensure_ascii=False).encode()
    json.dumps(job.losses(), allow_nan=False)
    job.folder.samples()
    job.folder.best_concept()
    newest, problems = job.folder.newest_checkpoint()
    assert newest is None or len(newest.parameters) == len(newest.moments)
    assert all(isinstance(problem, str) for problem in problems)
    job.folder.newest_step(3)


def one_round(rng: random.Random, jobs: Path, seen: Counter[str]) -> None:
    shutil.copytree(OLD_JOB, jobs / "good")
    odd = [f"odd-{number}" for number in range(rng.randrange(1, 4))]
    for name in odd:
        shutil.copytree(OLD_JOB, jobs / name)
        if rng.random() < 0.2:
            (jobs / name / "outcome.json").unlink()
        for _ in range(rng.randrange(1, 4)):
            make_odd(rng, jobs / name)
    service = TrainingService(jobs)
    listed = {job.id: job for job in service.jobs()}
    there = {name for name in odd if (jobs / name / "job.json").exists()}
    assert listed.keys() == {"good", *there}, listed.keys()
    assert listed["good"].snapshot().state is JobState.FINISHED
    assert listed["good"].losses() == [1.0, 0.5, 1 / 3, 0.25]
    for job in listed.values():
        try:
            look_at(job)
        except (JobError, CheckpointError):
            seen["errors of ours"] += 1
        seen[f"state {job.snapshot().state.value}"] += 1
        seen["unreadable descriptions"] += bool(job.folder.description.fault)
    service.find(GOOD["fingerprint"], 4)
    for name in there:
        service.delete(name)
    assert [job.id for job in service.jobs()] == ["good"]
    for _ in range(50):  # by themselves: many more of them
        read_one_record(rng, seen)


def read_one_record(rng: random.Random, seen: Counter[str]) -> None:
    """Values that are written and read are the same; what is refused is a ValueError."""
    name, parse = rng.choice(_RECORDS)
    text = (OLD_JOB / name).read_text(encoding="utf-8")
    values = json.loads(text.splitlines()[0] if name.endswith("l") else text)
    for key in rng.sample([*values], rng.randrange(3)):
        values[key] = odd_value(rng)
    content = json.dumps(values).encode()
    if rng.random() < 0.3:
        content = content[: rng.randrange(len(content))] + rng.randbytes(rng.randrange(9))
    try:
        record = parse(content)
    except ValueError:
        seen["records refused"] += 1
        return
    seen["records taken"] += 1
    if not isinstance(record, Description):
        assert parse(record.as_json().encode()) == record


def main() -> int:
    seconds, seed = float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    end, rounds, findings = time.monotonic() + seconds, 0, 0
    seen: Counter[str] = Counter()
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("it hangs")))
    while time.monotonic() < end and findings < 20:
        rng = random.Random(f"{seed} {rounds}")
        rounds += 1
        with tempfile.TemporaryDirectory() as folder:
            signal.alarm(_LIMIT_S)
            try:
                one_round(rng, Path(folder) / "jobs", seen)
            except Exception:  # noqa: BLE001 (that is what is looked for)
                findings += 1
                print(f"finding in round {rounds - 1} of seed {seed}:\n{traceback.format_exc()}")
            finally:
                signal.alarm(0)
    print(f"{rounds} rounds, {findings} findings; {dict(sorted(seen.items()))}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
