"""What a route over HTTP is: what may be sent to it, checked, and what it answers with."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...concept.errors import CustomDiffusionError

PREFIX = "/custom_diffusion"
MOST_BODY_BYTES = 64 * 1024
"""Of a request. The only body that means anything is of some twenty."""
JSON_TYPE = "application/json"
PICTURE_TYPES = ("image/png", "image/jpeg", "image/webp")
PICTURE = "picture"

Lane = Literal["jobs", "concepts", "inspections", "pictures"]
"""Which threads answer: nobody who looks at jobs waits for somebody who reads files."""


class UnusableRequestError(CustomDiffusionError):
    """A request that nothing can be made of, with its HTTP status."""

    def __init__(self, why: str, status: int = 400) -> None:
        super().__init__(f"What was sent cannot be used ({why}).")
        self.status = status


@dataclass(frozen=True)
class Parameter:
    """A value that a route takes: a whole number or a text."""

    name: str
    place: Literal["path", "query", "body"]
    description: str
    default: int | str | None = None
    """None where it must be sent"""
    most: int | None = None
    """Of a whole number, which is 0 or more. None makes it a text."""
    choices: tuple[str, ...] = ()
    """Of a text; empty for any"""

    def value(self, sent: Any) -> int | str:
        """Raises UnusableRequestError for what this cannot be."""
        if self.most is not None:
            number = _whole_number(sent, in_text=self.place != "body")
            if number is None or number > self.most:
                needed = f"a whole number, 0 or more and at most {self.most}"
                raise UnusableRequestError(f"{self.name} is {_short(sent)}; needed {needed}")
            return number
        if not isinstance(sent, str) or (self.choices and sent not in self.choices):
            needed = "one of " + ", ".join(filter(None, self.choices)) if self.choices else "a text"
            raise UnusableRequestError(f"{self.name} is {_short(sent)}; needed {needed}")
        return sent


@dataclass(frozen=True)
class Endpoint:
    """A route: what is sent, and what is answered."""

    operation: str
    """By which the server finds what answers it"""
    method: Literal["GET", "POST", "DELETE"]
    path: str
    """Below `PREFIX`"""
    summary: str
    answer: str
    """Name of its schema in `schemas.SCHEMAS`, or `PICTURE`"""
    parameters: tuple[Parameter, ...] = ()
    lane: Lane = "jobs"
    conflict: str = ""
    """When it answers 409"""

    def values(self, sent: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What was sent, by place and name, as values by name, with defaults for what was not.

        Raises UnusableRequestError for an unknown name, a missing one and a value out of bounds.
        """
        known = {(parameter.place, parameter.name): parameter for parameter in self.parameters}
        for place, values in sent.items():
            for name in values:
                if (place, name) not in known:
                    names = ", ".join(name for where, name in known if where == place)
                    raise UnusableRequestError(
                        f"the {place} holds {_short(name)}, which is not known here; "
                        f"known: {names or 'nothing'}"
                    )
        return {
            parameter.name: _value(parameter, sent.get(parameter.place, {}))
            for parameter in self.parameters
        }

    def statuses(self) -> dict[int, str]:
        """Every status that it answers with → when."""
        names_something = any(parameter.place == "path" for parameter in self.parameters)
        return {
            200: self.summary,
            **({304: "The picture is as it was (If-None-Match)"} if self.answer == PICTURE else {}),
            400: "What was sent cannot be understood",
            **({404: "It is not there"} if names_something else {}),
            405: "The path is another route's: what is put into it must be percent-encoded",
            **({409: self.conflict} if self.conflict else {}),
            413: f"The body is larger than {MOST_BODY_BYTES // 1024} KiB",
            **({415: f"The Content-Type is not {JSON_TYPE}"} if self.method == "POST" else {}),
            500: "A fault of this pack; the server's log says where",
            503: "Too many ask at once; Retry-After says when to ask again",
        }


def _value(parameter: Parameter, sent: Mapping[str, Any]) -> int | str:
    if parameter.name in sent:
        return parameter.value(sent[parameter.name])
    if parameter.default is None:
        raise UnusableRequestError(f"{parameter.name} is missing from the {parameter.place}")
    return parameter.default


def _whole_number(sent: Any, in_text: bool) -> int | None:
    """Of ASCII digits in a path or a query; of JSON, in which 1.0 is one too and `true` is none."""
    if in_text:
        return int(sent) if re.fullmatch("[0-9]{1,12}", sent) else None
    if isinstance(sent, bool) or not isinstance(sent, (int, float)):
        return None
    whole = isinstance(sent, int) or sent.is_integer()
    return int(sent) if whole and sent >= 0 else None


def _short(sent: Any) -> str:
    """As an error message shows it: without letters that cannot be written, and not all of it."""
    text = ascii(sent) if isinstance(sent, str) else json.dumps(sent)
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"
