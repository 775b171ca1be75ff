"""What the text files of a job's folder say. A folder may come from anybody: each file has one
constructor that checks it, and whoever reads it gets what that let through.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ...concept.errors import ConfigError
from ...concept.regular_files import read_regular

MOST_STEPS = 10**9 - 1
"""Nine digits, as the files of a step are called"""
_MOST_BYTES = 32 * 2**20
"""Of a description or an outcome. Graphs with pictures in them are large."""
LINE_BYTES = 1000
"""Of a line of the metrics"""
MOST_LETTERS = 100_000
"""Letters of a name, an error or a note"""
MOST_NOTES = 50
MOST_CELLS = 100
"""Pictures of a comparison"""
_DEPTH = 100
"""Of lists in lists: whoever walks through them once more must not run out of stack."""
_ENDS = ("finished", "stopped", "failed")
_LARGEST_LOSS = 3.5e38
"""No number of 32 bits is larger, and some of them can be added."""
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Description:
    """job.json: what a job was asked to do."""

    name: str
    steps: int
    created: float = 0.0
    """Seconds since 1970"""
    fingerprint: str = ""
    """Empty where no other job takes the same steps"""
    keep_best: int = 1
    ends_early: str = ""
    """What may end it before its steps are done; empty where nothing does"""
    graph: Mapping[str, Any] = field(default_factory=dict)
    """ComfyUI's, by node; empty where there is none"""
    content: Mapping[str, Any] = field(default_factory=dict)
    """All of the file: JSON without infinite numbers"""
    fault: str = ""
    """Why the file cannot be used; then nothing else here is from it, and there are no steps."""

    def __post_init__(self) -> None:
        _check_text("name", self.name)
        _check_count("steps", self.steps, 0 if self.fault else 1)
        _check_number("created", self.created)
        _check_text("fingerprint", self.fingerprint)
        _check_count("keep_best", self.keep_best)
        _check_text("ends_early", self.ends_early)
        _check("graph", self.graph, isinstance(self.graph, dict), "a JSON object")

    @staticmethod
    def parse(content: bytes) -> Description:
        """Raises ValueError with the reason why it is no description."""
        values = _json_object(content)
        names = ("created", "fingerprint", "keep_best", "ends_early")
        chosen = {name: values[name] for name in names if name in values}
        return Description(
            name=values.get("name"),  # type: ignore[arg-type]  # that is checked
            steps=values.get("steps"),  # type: ignore[arg-type]
            graph=values.get("graph") or {},
            content=values,
            **chosen,
        )


@dataclass(frozen=True)
class Outcome:
    """outcome.json: how a job ended."""

    state: str
    step: int | None = None
    """None where that is not said"""
    concept_file: str = ""
    error: str = ""
    log: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check("state", self.state, self.state in _ENDS, f"one of {', '.join(_ENDS)}")
        if self.step is not None:
            _check_count("step", self.step)
        for name in ("concept_file", "error", "log"):
            _check_text(name, getattr(self, name))
        _check("concept_file", self.concept_file, "\0" not in self.concept_file, "a path")
        _check("notes", self.notes, len(self.notes) <= MOST_NOTES, f"at most {MOST_NOTES} notes")
        for note in self.notes:
            _check_text("notes", note)

    @staticmethod
    def parse(content: bytes) -> Outcome:
        """Raises ValueError with the reason why it is none."""
        values = _json_object(content)
        notes = values.get("notes", [])
        _check("notes", notes, isinstance(notes, list), "a list")
        names = ("step", "concept_file", "error", "log")
        chosen = {name: values[name] for name in names if name in values}
        return Outcome(values.get("state"), notes=tuple(notes), **chosen)  # type: ignore[arg-type]

    def as_json(self) -> str:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return json.dumps(values, ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class MetricsLine:
    """A line of metrics.jsonl."""

    step: int
    loss: float
    time: float | None
    """Seconds since 1970; None where the line was made again from a checkpoint"""
    validation: float | None = None
    """Loss on pictures that are kept back, where it was measured after the step"""

    def __post_init__(self) -> None:
        _check_count("step", self.step, 1)
        _check_loss("loss", self.loss)
        if self.validation is not None:
            _check_loss("validation", self.validation)
        if self.time is not None:
            _check_number("time", self.time)

    @staticmethod
    def parse(content: bytes) -> MetricsLine:
        """Raises ValueError where it is none: a killed process may have left half of one."""
        try:
            values = json.loads(content)
            known = values["step"], values["loss"], values["time"]
            return MetricsLine(*known, validation=values.get("validation"))
        except (LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"it is no line of metrics ({error})") from error

    def as_json(self) -> str:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if self.validation is None:
            del values["validation"]
        return json.dumps(values, allow_nan=False)


@dataclass(frozen=True)
class ComparisonPlan:
    """plan.json of a comparison: what its pictures show. Their numbers count seeds first, then
    strengths, then steps.
    """

    prompt: str
    steps: tuple[int, ...]
    strengths: tuple[float, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_text("prompt", self.prompt)
        for step in self.steps:
            _check_count("steps", step, 1)
        for number in (*self.strengths, *self.seeds):
            fits = isinstance(number, (int, float)) and not isinstance(number, bool)
            _check("strengths and seeds", number, fits and abs(number) < 2**64, "numbers")
        _check("pictures", len(self), 0 < len(self) <= MOST_CELLS, f"1 to {MOST_CELLS} of them")

    def __len__(self) -> int:
        return len(self.steps) * len(self.strengths) * len(self.seeds)

    def step_of(self, number: int) -> int:
        """Of the picture with that number."""
        return self.steps[number // (len(self.strengths) * len(self.seeds))]

    @staticmethod
    def parse(content: bytes) -> ComparisonPlan:
        """Raises ValueError with the reason why it is none."""
        values = _json_object(content)
        axes = [values.get(name) for name in ("steps", "strengths", "seeds")]
        for axis in axes:
            _check("numbers", axis, isinstance(axis, list), "a list")
        return ComparisonPlan(values.get("prompt"), *map(tuple, axes))  # type: ignore[arg-type]

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class RecordFile(Generic[_Record]):
    """A file that holds a record: read again only when it is another file."""

    def __init__(
        self, path: Path, parse: Callable[[bytes], _Record], unusable: Callable[[str], _Record]
    ) -> None:
        """`unusable` makes a record of the reason why there is no other."""
        self._path, self._parse, self._unusable = path, parse, unusable
        self._seen: tuple[tuple[int, int, int], _Record] | None = None

    def read(self) -> _Record | None:
        """The same object until the file changes; None where there is no file."""
        try:
            status = self._path.stat()
            stamp = status.st_mtime_ns, status.st_size, status.st_ino
            if self._seen is None or self._seen[0] != stamp:
                self._seen = stamp, self._record()
        except FileNotFoundError:
            return None
        except OSError as error:  # the next time it may be different
            return self._unusable(error.strerror or str(error))
        return self._seen[1]

    def _record(self) -> _Record:
        try:
            return self._parse(read_regular(self._path, _MOST_BYTES))
        except ValueError as error:
            return self._unusable(text_that_fits(str(error)))


def text_that_fits(text: str) -> str:
    """An error or a log as the files of a job take it: whole characters, and not too many."""
    return text.encode(errors="backslashreplace").decode()[-MOST_LETTERS:]


def description_bytes(values: Mapping[str, Any]) -> bytes:
    """A job.json of these values. Raises ConfigError where it could not be read again."""
    try:
        text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
        content = text.encode()
        if len(content) > _MOST_BYTES:
            raise ValueError(f"they are larger than {_MOST_BYTES / 1e6:.0f} MB")
        Description.parse(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"The settings of the training job {reprlib.repr(values.get('name'))} cannot be kept "
            f"({error}). Change the graph or the name, and train again."
        ) from error
    return content


def _json_object(content: bytes) -> dict[str, Any]:
    """Raises ValueError unless it is one, with values that are the same wherever they are read."""
    try:
        values = json.loads(content)
        _check_json(values, _DEPTH)
    except RecursionError as error:
        raise ValueError("its brackets are too deep") from error
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return values


def _check_json(value: Any, depth: int) -> None:
    if depth == 0:
        raise ValueError(f"its lists and objects are more than {_DEPTH} deep")
    if isinstance(value, str):
        value.encode()  # raises ValueError for half of a surrogate pair
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"it holds the number {value}")
    elif isinstance(value, list):
        for each in value:
            _check_json(each, depth - 1)
    elif isinstance(value, dict):
        for key, each in value.items():
            key.encode()
            _check_json(each, depth - 1)


def _check(name: str, value: object, fits: bool, needed: str) -> None:
    if not fits:
        raise ValueError(f"its {name} is {reprlib.repr(value)}; needed: {needed}")


def _check_text(name: str, value: object) -> None:
    fits = isinstance(value, str) and len(value) <= MOST_LETTERS
    _check(name, value, fits, f"a text of at most {MOST_LETTERS} letters")


def _check_count(name: str, value: object, least: int = 0) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST_STEPS
    _check(name, value, fits, f"a whole number from {least} to {MOST_STEPS}")


def _check_loss(name: str, value: object) -> None:
    fits = isinstance(value, float) and abs(value) <= _LARGEST_LOSS
    _check(name, value, fits, "a loss")


def _check_number(name: str, value: object) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15
    _check(name, value, fits, "a number")
