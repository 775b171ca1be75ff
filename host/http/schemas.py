"""What the routes answer, as JSON Schemas: what most readers of the description look for."""

from __future__ import annotations

from typing import Any

from ...trainer.jobs.snapshot import Doing, JobState

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number"}
MAYBE_NUMBER: Schema = {"type": ["number", "null"]}
MAYBE_TEXT: Schema = {"type": ["string", "null"]}
COUNT: Schema = {"type": "integer", "minimum": 0}
MAYBE_COUNT: Schema = {"type": ["integer", "null"], "minimum": 0}
ANYTHING: Schema = {"type": "object"}


def _object(**properties: Schema) -> Schema:
    """All of them are there."""
    return {"type": "object", "properties": properties, "required": sorted(properties)}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _map(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _said(schema: Schema, description: str) -> Schema:
    return {**schema, "description": description}


_JOB = _object(
    id=TEXT,
    name=TEXT,
    state={"type": "string", "enum": [state.value for state in JobState]},
    step=COUNT,
    steps=COUNT,
    progress=_said(NUMBER, "How much is done of all that there is to do, 0 to 1"),
    doing=_said(
        {"type": "string", "enum": [doing.value for doing in Doing]},
        "What it is busy with, where that is no step; else empty",
    ),
    waiting=_said(FLAG, "Whether it makes room for a prompt"),
    awaited=_said(FLAG, "Whether a prompt waits for it"),
    loss=_said(MAYBE_NUMBER, "Of the last step; null where there is none that is finite"),
    seconds_per_step=MAYBE_NUMBER,
    drift=_said(
        _map(MAYBE_NUMBER),
        "New word → how far its embedding is from where it began, over its length then",
    ),
    preview_step=COUNT,
    notes=_said(_list(TEXT), "Troubles that it got over"),
    error=TEXT,
    concept_file=MAYBE_TEXT,
)
_CARD = _object(
    name=TEXT,
    file=TEXT,
    megabytes=NUMBER,
    base=_said(TEXT, "Family of the base model; empty where the file does not tell"),
    family=_said(TEXT, "The same as people say it"),
    prompts=_list(TEXT),
    method=TEXT,
    steps=MAYBE_COUNT,
    resolution=_said(MAYBE_COUNT, "Edge in pixels of the pictures it was taught with"),
    created=_said(TEXT, "ISO 8601, UTC"),
    thumbnail=_said(FLAG, "Whether there is a picture beside the file"),
    other=_said(TEXT, "What kind of another tool's file it is; empty for a concept"),
)
_TOKEN = _object(
    name=TEXT,
    class_noun=TEXT,
    initializer=TEXT,
    vectors=COUNT,
    norms=_said(_map(_list(MAYBE_NUMBER)), "Text encoder → Euclidean norm of each vector"),
)
_LAYER = _object(
    layer=TEXT,
    shape=_list(COUNT),
    rank=_said(MAYBE_COUNT, "Null for a layer that is stored whole"),
    numbers=COUNT,
    megabytes=_said(NUMBER, "In half precision"),
    norm=_said(MAYBE_NUMBER, "Frobenius norm of the change"),
    components=_said(
        _map(COUNT),
        "Share → how many singular values, largest first, reach this share of their sum",
    ),
)
_INSPECTION = _object(
    name=TEXT,
    file=TEXT,
    file_megabytes=MAYBE_NUMBER,
    created=TEXT,
    description=TEXT,
    family=TEXT,
    title=TEXT,
    base_hash=TEXT,
    tokens=_list(_TOKEN),
    layers=_list(_LAYER),
    totals=_object(numbers=COUNT, megabytes=NUMBER, norm=MAYBE_NUMBER),
    constraint_prompts=_list(TEXT),
    provenance=ANYTHING,
    fit={"type": ["object", "null"]},
)
_IN_FULL = _object(
    loaded=_said(FLAG, "Whether its models are, so that it can be resumed"),
    log=_said(TEXT, "Where a failed job failed"),
    memory=_said(
        _object(device=TEXT, free_bytes=COUNT, total_bytes=COUNT), "Of the device that trains"
    ),
    samples=_said(_list(COUNT), "The steps that a picture was drawn at"),
    compared=_said(COUNT, "How many pictures the sheet of its steps has by now"),
)

SCHEMAS: dict[str, Schema] = {
    "Job": _JOB,
    "JobInFull": {"allOf": [_reference("Job"), _IN_FULL]},
    "Jobs": _object(
        jobs=_list(_reference("Job")),
        queue=_said(_list(TEXT), "Ids of those that wait for their turn, the next one first"),
    ),
    "Queue": _object(queue=_list(TEXT)),
    "Deleted": _object(deleted=TEXT),
    "Binned": _object(
        deleted=_said(TEXT, "The name by which it was known"),
        bin=_said(TEXT, "Where it is now, below the same folder"),
    ),
    "Pictures": _object(folder=TEXT, pictures=_said(_list(TEXT), "Names, in their order")),
    "Losses": _object(
        after=COUNT,
        losses=_list(MAYBE_NUMBER),
        validation=_said(
            _map(MAYBE_NUMBER),
            "Step → loss after it on pictures that are kept back; of the steps it was measured at",
        ),
    ),
    "Differences": _object(
        settings=_said(
            _map(_list(MAYBE_TEXT)),
            "Setting → its value in this job and in the other, null where it has none",
        )
    ),
    "Comparison": _object(
        prompt=TEXT,
        steps=_list(COUNT),
        strengths=_list(NUMBER),
        seeds=_list(COUNT),
        pictures=_said(
            _list(COUNT),
            "Numbers of those that are drawn. They count seeds first, then strengths, then steps",
        ),
    ),
    "Graph": _said(_map(ANYTHING), "Id of a node → the node"),
    "Card": _CARD,
    "Concepts": _object(
        concepts=_list(_reference("Card")),
        unreadable=_said(_map(TEXT), "Name → why it cannot be read"),
        other=_said(_list(TEXT), "Names of other tools' files"),
        bases=_said(_map(TEXT), "Base models that there is a file of, as people say them"),
    ),
    "Inspection": _INSPECTION,
    "Error": _object(error=_said(TEXT, "What was sent, what was needed, what to do")),
}
