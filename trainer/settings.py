"""What is known of a setting beside its name, type and default. It is written once, in the metadata
of a field of `TrainConfig`; checks, node inputs and command options are made from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from ..concept.errors import ConfigError

Group = Literal["method", "run", "views", "advanced", "added", "options", "job"]
"""Where nodes show a setting, in this order and in that of the fields: with the choice of the
method; first; with how views are made; among the advanced ones; and, for those that came after the
first version, last and optional, because saved graphs know inputs by their place. `options`, what
few trainings need, have a node of their own. Settings of a job (`JobSettings`) have places of their
own.
"""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Setting:
    """A setting of a training. Bounds are inclusive; without one there is no limit."""

    name: str
    kind: type
    """bool, int, float, or str: one of the `choices`, or any text where there are none"""
    default: Any
    choices: tuple[str, ...]
    may_be_none: bool
    help: str
    group: Group | None
    """None: neither nodes nor the command offer it."""
    method: str
    """The only method that reads it; empty: all do."""
    least: float | None
    most: float | None
    step: float | None
    """By which a widget goes up and down. An int is a multiple of it."""

    def check(self, value: Any) -> None:
        """Raises ConfigError for what the setting cannot be."""
        if self.choices and value not in self.choices:
            raise ConfigError(
                f"{self.name}={value!r} is unknown; choose one of "
                f"{', '.join(map(repr, self.choices))}."
            )
        if self.kind is str and not isinstance(value, str):
            raise ConfigError(
                f"{self.name}={value!r} is no text, which is needed. It means: {self.help}"
            )
        if self.kind not in (int, float) or (value is None and self.may_be_none):
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(
                f"{self.name}={value!r} is no number, which is needed. It means: {self.help}"
            )
        least = -math.inf if self.least is None else self.least
        most = math.inf if self.most is None else self.most
        if not (math.isfinite(value) and least <= value <= most):
            raise ConfigError(
                f"{self.name}={value} is outside {least:g} to {most:g}: use a finite number "
                f"between them. It means: {self.help}"
            )
        if self.kind is int and self.step and value % self.step:
            nearest = round(value / self.step) * self.step
            raise ConfigError(f"{self.name}={value} is no multiple of {self.step}. Use {nearest}.")


def setting(
    default: _T,
    help: str,
    group: Group | None,
    *,
    method: str = "",
    least: float | None = None,
    most: float | None = None,
    step: float | None = None,
) -> _T:
    """A field of `TrainConfig`, with what `Setting` says of it."""
    known = {"help": help, "group": group, "method": method}
    return field(default=default, metadata={**known, "least": least, "most": most, "step": step})


def settings_of(config: type) -> Mapping[str, Setting]:
    """Of a dataclass whose fields are made by `setting`, by name, in their order."""
    types = get_type_hints(config)
    found = {}
    for one in fields(config):
        kinds = [kind for kind in get_args(types[one.name]) if isinstance(kind, type)]
        choices = tuple(kind for kind in get_args(types[one.name]) if isinstance(kind, str))
        assert one.default is not MISSING, f"{one.name} has no default"
        found[one.name] = Setting(
            name=one.name,
            kind=str if choices else (kinds or [types[one.name]])[0],
            default=one.default,
            choices=choices,
            may_be_none=type(None) in kinds,
            **one.metadata,
        )
    return found
