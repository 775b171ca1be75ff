"""The routes over HTTP as one table. The server answers what stands here and `openapi.py` describes
it, so neither can say what the other does not know.

It knows neither ComfyUI nor aiohttp. What answers a route is in `host/comfyui/http/routes.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...concept.errors import CustomDiffusionError
from ...concept.layers import FAMILIES
from ...inspection.library import ORDERS, SORTS
from ...trainer.jobs.records import MOST_CELLS

PREFIX = "/custom_diffusion"
MOST_STEPS = 1_000_000_000
"""No training has more; a file of a sample has a name of so many digits."""
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


_JOB = Parameter("id", "path", "The job's id, which is its folder's name")
_CONCEPT = Parameter(
    "name", "path", "The file below ComfyUI's folders for concepts; a slash in it may be %2F"
)
_FOLDER = Parameter("folder", "query", "As Custom Diffusion Concept offers it")
_PICTURE = Parameter("name", "path", "One of the folder's `pictures`")
_CONCEPT_FAULT = "The file cannot be read as what it claims to be"
_NOT_NOW = "The job cannot do that in the state it is in; the answer says why"

ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("list_jobs", "GET", "/jobs", "All jobs, the oldest first", "Jobs"),
    Endpoint("show_job", "GET", "/jobs/{id}", "A job in full", "JobInFull", (_JOB,)),
    Endpoint(
        "delete_job",
        "DELETE",
        "/jobs/{id}",
        "Removes the job and its folder; the concept that it saved stays",
        "Deleted",
        (_JOB,),
        conflict="The job is at work, or some of it could not be removed; the answer says what",
    ),
    Endpoint(
        "show_losses",
        "GET",
        "/jobs/{id}/metrics",
        "The losses of the steps after some step",
        "Losses",
        (_JOB, Parameter("after", "query", "That step", default=0, most=MOST_STEPS)),
    ),
    Endpoint(
        "show_graph",
        "GET",
        "/jobs/{id}/graph",
        "The graph that the job came from, as ComfyUI's /prompt takes it",
        "Graph",
        (_JOB,),
        conflict="The job did not come from a graph",
    ),
    Endpoint(
        "show_sample",
        "GET",
        "/jobs/{id}/samples/{step}",
        "A picture that was drawn at a step",
        PICTURE,
        (_JOB, Parameter("step", "path", "One of the job's `samples`", most=MOST_STEPS)),
        conflict="The file is no picture",
    ),
    Endpoint(
        "show_comparison",
        "GET",
        "/jobs/{id}/comparison",
        "The sheet of the job's steps that was drawn last, or is being drawn",
        "Comparison",
        (_JOB,),
    ),
    Endpoint(
        "show_compared",
        "GET",
        "/jobs/{id}/comparison/{picture}",
        "A picture of that sheet",
        PICTURE,
        (_JOB, Parameter("picture", "path", "One of its `pictures`", most=MOST_CELLS)),
        conflict="The file is no picture",
    ),
    Endpoint(
        "take_step",
        "POST",
        "/jobs/{id}/comparison/take",
        "Saves the concept of a picture's step as a new file, and the picture beside it",
        "Card",
        (
            _JOB,
            Parameter("picture", "body", "One of the sheet's `pictures`", most=MOST_CELLS),
            Parameter("name", "body", "Of the file; a number is added where it is taken"),
        ),
        conflict="The concept cannot be read, or the file cannot be written",
    ),
    Endpoint(
        "pause_job",
        "POST",
        "/jobs/{id}/pause",
        "Asks the job to write a checkpoint and leave the device after the step it is in",
        "Job",
        (_JOB,),
        conflict=_NOT_NOW,
    ),
    Endpoint(
        "resume_job",
        "POST",
        "/jobs/{id}/resume",
        "Lets a paused job continue, before those that wait",
        "Job",
        (_JOB,),
        conflict=_NOT_NOW,
    ),
    Endpoint(
        "stop_job",
        "POST",
        "/jobs/{id}/stop",
        "Asks the job to save what it has learnt and end",
        "Job",
        (_JOB,),
        conflict=_NOT_NOW,
    ),
    Endpoint(
        "release_prompt",
        "POST",
        "/jobs/{id}/release",
        "Lets the prompt go that waits for the job: its other nodes run, the queue moves on, and "
        "the job stays as it is",
        "Job",
        (_JOB,),
        conflict="No prompt waits for the job",
    ),
    Endpoint(
        "move_job",
        "POST",
        "/jobs/{id}/position",
        "Moves a job that waits for its turn",
        "Queue",
        (_JOB, Parameter("position", "body", "Its new place, 0 for the next one", most=1_000_000)),
        conflict="The job does not wait for its turn",
    ),
    Endpoint(
        "list_concepts",
        "GET",
        "/concepts",
        "The files in ComfyUI's folders for concepts",
        "Concepts",
        (
            Parameter("search", "query", "Words that the name or the prompts hold", default=""),
            Parameter(
                "base", "query", "Of this base model only", default="", choices=("", *FAMILIES)
            ),
            Parameter("sort", "query", "In this order", default="name", choices=SORTS),
            Parameter(
                "order",
                "query",
                "Without it the newest and the largest come first, the rest ascends",
                default="",
                choices=("", *ORDERS),
            ),
        ),
        lane="concepts",
    ),
    Endpoint(
        "show_thumbnail",
        "GET",
        "/concepts/{name}/thumbnail",
        "The picture beside the file",
        PICTURE,
        (_CONCEPT,),
        lane="concepts",
        conflict="The file is no picture",
    ),
    Endpoint(
        "rename_concept",
        "POST",
        "/concepts/{name}/rename",
        "Gives the file, and the picture beside it, another name in the same folder",
        "Card",
        (_CONCEPT, Parameter("to", "body", "The name, made harmless as when one is saved")),
        lane="concepts",
        conflict="That name is taken, or the file cannot be moved",
    ),
    Endpoint(
        "delete_concept",
        "DELETE",
        "/concepts/{name}",
        "Moves the file, and the picture beside it, into the folder `bin` beside it",
        "Binned",
        (_CONCEPT,),
        lane="concepts",
        conflict="The file cannot be moved",
    ),
    Endpoint(
        "inspect_concept",
        "GET",
        "/concepts/{name}/inspection",
        "What the concept is, layer by layer; reads the whole file",
        "Inspection",
        (_CONCEPT,),
        lane="inspections",
        conflict=_CONCEPT_FAULT,
    ),
    Endpoint(
        "list_pictures",
        "GET",
        "/pictures",
        "The pictures directly in a folder of ComfyUI's input",
        "Pictures",
        (_FOLDER,),
        lane="pictures",
        conflict="There is no such folder, or it cannot be read",
    ),
    Endpoint(
        "show_picture",
        "GET",
        "/pictures/{name}",
        "A small copy of a picture",
        PICTURE,
        (_PICTURE, _FOLDER),
        lane="pictures",
        conflict="The file is no picture",
    ),
    Endpoint(
        "delete_picture",
        "DELETE",
        "/pictures/{name}",
        "Moves the picture, with its caption and its mask, into a hidden folder beside it",
        "Binned",
        (_PICTURE, _FOLDER),
        lane="pictures",
        conflict="The file cannot be moved",
    ),
    Endpoint(
        "show_concept",
        "GET",
        "/concepts/{name}",
        "What the header of the file says",
        "Card",
        (_CONCEPT,),
        lane="concepts",
        conflict=_CONCEPT_FAULT,
    ),
)
"""In the order in which they are looked through: the last one takes any path below its own."""
