"""Folders of jobs as no training leaves them, and one as a version before this left it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

OLD_JOB = Path(__file__).with_name("old_job")
"""Written by the code before job files were checked: finished after four steps"""
GOOD: dict[str, Any] = {"name": "good", "created": 1.7e9, "steps": 8, "fingerprint": "good"}
DEEP = "[" * 100_000
UNREADABLE = "describes no training job"
"""What is said of a folder whose description is odd"""
UNKNOWN_END = "does not say how the job ended"
USABLE = ""

Odd = tuple[str, Callable[[Path], object]]
"""What is said of the job, and what makes a good folder an odd one"""


def good_job(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({**GOOD, **changes}), encoding="utf-8")
    return folder


def old_job(jobs: Path) -> Path:
    return Path(shutil.copytree(OLD_JOB, jobs / "20261128-124435-Käse-猫"))


def _described(**changes: Any) -> Odd:
    """A value may be one that JSON does not have, as Python writes it."""
    text = json.dumps({**GOOD, **changes})
    return UNREADABLE, lambda folder: (folder / "job.json").write_text(text)


def _text(name: str, text: str | bytes, said: str) -> Odd:
    content = text.encode() if isinstance(text, str) else text
    return said, lambda folder: (folder / name).write_bytes(content)


def _ended(**changes: Any) -> Odd:
    return _text("outcome.json", json.dumps({"state": "failed", "step": 3, **changes}), UNKNOWN_END)


def _metrics(*lines: str) -> Odd:
    good = '{"step": 1, "loss": 0.5, "time": 1.0}\n'
    return _text("metrics.jsonl", good + "\n".join(lines), USABLE)


def _instead(name: str, make: Callable[[Path], object], said: str) -> Odd:
    def put(folder: Path) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        make(path)

    return said, put


def _large(path: Path) -> None:
    path.touch()
    os.truncate(path, 300 * 10**6)


def _step_file(name: str) -> Odd:
    def put(folder: Path) -> None:
        for kind in ("checkpoints", "concepts", "samples"):
            (folder / kind).mkdir()
            for ending in (".safetensors", ".png"):
                (folder / kind / f"{name}{ending}").write_bytes(b"no such thing")

    return USABLE, put


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


ODD: dict[str, Odd] = {
    "name missing": _text("job.json", '{"steps": 3}', UNREADABLE),
    "name a number": _described(name=3),
    "name half a pair": _described(name="cat \ud800"),
    "name endless": _described(name="c" * 10**6),
    "steps missing": _text("job.json", '{"name": "cat"}', UNREADABLE),
    "steps true": _described(steps=True),
    "steps negative": _described(steps=-3),
    "steps none at all": _described(steps=0),
    "steps half": _described(steps=2.5),
    "steps not a number": _described(steps=float("nan")),
    "steps infinite": _described(steps=float("inf")),
    "steps of 400 digits": _described(steps=10**400),
    "steps of 5000 digits": _text(
        "job.json", f'{{"name": "a", "steps": {"9" * 5000}}}', UNREADABLE
    ),
    "steps a list": _described(steps=[8]),
    "steps 1e999": _text("job.json", '{"name": "a", "steps": 1e999}', UNREADABLE),
    "created a text": _described(created="yesterday"),
    "created a list": _described(created=[1]),
    "created not a number": _described(created=float("nan")),
    "created null": _described(created=None),
    "created of 400 digits": _described(created=10**400),
    "fingerprint a list": _described(fingerprint=["good"]),
    "keep_best a text": _described(keep_best="all"),
    "keep_best negative": _described(keep_best=-1),
    "graph a list": _described(graph=[1]),
    "config not a number": _described(config={"rate": float("nan")}),
    "config infinite": _text("job.json", '{"name": "a", "steps": 1, "b": 1e999}', UNREADABLE),
    "config half a pair": _described(config={"\udfff": 1}),
    "config deep": _described(config=_nested(500)),
    "brackets": _text("job.json", DEEP, UNREADABLE),
    "braces": _text("job.json", '{"a":' * 100_000, UNREADABLE),
    "a list": _text("job.json", "[]", UNREADABLE),
    "null": _text("job.json", "null", UNREADABLE),
    "empty": _text("job.json", "", UNREADABLE),
    "cut": _text("job.json", json.dumps(GOOD)[:-9], UNREADABLE),
    "no text": _text("job.json", b"\xff\x00\xfe{}" * 9, UNREADABLE),
    "zeros": _text("job.json", b"\0" * 100, UNREADABLE),
    "description a folder": _instead("job.json", Path.mkdir, UNREADABLE),
    "description a pipe": _instead("job.json", os.mkfifo, UNREADABLE),
    "description of 300 MB": _instead("job.json", _large, UNREADABLE),
    "description a link to itself": _instead(
        "job.json", lambda path: path.symlink_to(path), UNREADABLE
    ),
    "description a link to nothing": _instead(
        "job.json", lambda path: path.symlink_to("nothing"), UNREADABLE
    ),
    "description a device": _instead(
        "job.json", lambda path: path.symlink_to("/dev/zero"), UNREADABLE
    ),
    "state unknown": _ended(state="asleep"),
    "state a list": _ended(state=["failed"]),
    "state missing": _text("outcome.json", "{}", UNKNOWN_END),
    "step negative": _ended(step=-1),
    "step true": _ended(step=True),
    "step nested": _ended(step={"a": [1]}),
    "step not a number": _ended(step=float("nan")),
    "notes a text": _ended(notes="none"),
    "notes of numbers": _ended(notes=[1, 2]),
    "notes without end": _ended(notes=["a"] * 10_000),
    "error a number": _ended(error=5),
    "error half a pair": _ended(error="\ud800"),
    "log a list": _ended(log=["a"]),
    "concept with NUL": _ended(concept_file="a\0b"),
    "concept a list": _ended(concept_file=["a"]),
    "outcome deep": _text("outcome.json", DEEP, UNKNOWN_END),
    "outcome a list": _text("outcome.json", "[]", UNKNOWN_END),
    "outcome cut": _text("outcome.json", '{"state": "fail', UNKNOWN_END),
    "outcome a folder": _instead("outcome.json", Path.mkdir, UNKNOWN_END),
    "outcome a pipe": _instead("outcome.json", os.mkfifo, UNKNOWN_END),
    "outcome of 300 MB": _instead("outcome.json", _large, UNKNOWN_END),
    "losses not numbers": _metrics('{"step": 2, "loss": NaN, "time": 1.0}'),
    "losses infinite": _metrics('{"step": 2, "loss": 1e999, "time": 1.0}'),
    "losses huge": _metrics('{"step": 2, "loss": 1e308, "time": 1.0}'),
    "losses of text": _metrics('{"step": 2, "loss": "a", "time": 1.0}'),
    "steps of metrics true": _metrics('{"step": true, "loss": 0.5, "time": 1.0}'),
    "time a text": _metrics('{"step": 2, "loss": 0.5, "time": "now"}'),
    "a line a list": _metrics("[1, 2]"),
    "a line deep": _metrics(DEEP[:900]),
    "a line without end": _metrics("9" * 10**6),
    "metrics no text": _metrics("\x00\x01"),
    "metrics a folder": _instead("metrics.jsonl", Path.mkdir, USABLE),
    "metrics a pipe": _instead("metrics.jsonl", os.mkfifo, USABLE),
    "step file in other digits": _step_file("５"),
    "step file of a power": _step_file("²"),
    "step file of 200 digits": _step_file("9" * 200),
    "step file negative": _step_file("-00000001"),
    "step file that is none": _step_file("000000004"),
    "checkpoint a pipe": (
        USABLE,
        lambda folder: (
            (folder / "checkpoints").mkdir(),
            os.mkfifo(folder / "checkpoints" / "000000004.safetensors"),
        ),
    ),
    "checkpoints a file": _text("checkpoints", "", USABLE),
    "lock a folder": _instead(".lock", Path.mkdir, USABLE),
    "lock a pipe": _instead(".lock", os.mkfifo, USABLE),
    "lock a link": _instead(".lock", lambda path: path.symlink_to("job.json"), USABLE),
    "claim a link": _instead(".claim", lambda path: path.symlink_to("job.json"), USABLE),
}


def odd_job(jobs: Path, kind: str) -> Path:
    """A folder in `jobs` that is odd in this way."""
    folder = good_job(jobs / kind.replace(" ", "-"), fingerprint="")
    ODD[kind][1](folder)
    return folder


def nameless_job(jobs: Path) -> Path:
    """Its folder's name is no text, as other systems write them."""
    return good_job(Path(os.fsdecode(os.fsencode(jobs / "cat-") + b"\xff\n")))
