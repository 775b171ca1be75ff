"""What the pack's nodes share: socket types, and how a node tells of its results in the page."""

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

from comfy_api.latest import io

CATEGORY = "custom diffusion"

Concept = io.Custom("CONCEPT")
TrainingConcept = io.Custom("TRAINING_CONCEPT")
RegularizationSet = io.Custom("REGULARIZATION_SET")
TrainingOptions = io.Custom("TRAINING_OPTIONS")
RegionSocket = io.Custom("CONCEPT_REGION")
PlacesSocket = io.Custom("CONCEPT_PLACES")

MOST_CONCEPTS = 8


def concepts_input(fewest: int, tooltip: str) -> io.Input:
    """From `fewest` to eight concepts, each with its strength; read by `chosen_concepts`."""
    return io.DynamicCombo.Input(
        "concepts",
        options=[
            io.DynamicCombo.Option(str(count), _slots(count))
            for count in range(fewest, MOST_CONCEPTS + 1)
        ],
        tooltip=tooltip,
    )


def _slots(count: int) -> list[io.Input]:
    inputs: list[io.Input] = []
    for number in range(1, count + 1):
        inputs.append(
            Concept.Input(
                f"concept_{number}",
                tooltip="A concept from Load Concept or Custom Diffusion Train. If two have the "
                "same trigger word, rename one in Load Concept.",
            )
        )
        inputs.append(
            io.Float.Input(
                f"strength_{number}",
                default=1.0,
                min=-4.0,
                max=4.0,
                step=0.05,
                tooltip="How much of this concept. 1 is as trained; lower it if the concept takes "
                "over the picture.",
            )
        )
    return inputs


def span_inputs() -> list[io.Input]:
    """`start_percent` and `end_percent`, as ComfyUI's nodes call a part of the sampling."""
    return [
        io.Float.Input(
            "start_percent",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="From which part of the sampling on: 0 is its first step. Before it the prompt "
            "means the class word alone. Raise it a little to let the base model set the layout.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="Up to which part of the sampling: 1 is its end. After it the prompt means the "
            "class word alone.",
        ),
    ]


def chosen_concepts(concepts: Any) -> list[tuple[Any, float]]:
    """Concepts and strengths of a `concepts_input`."""
    numbers = range(1, int(concepts["concepts"]) + 1)
    return [(concepts[f"concept_{number}"], concepts[f"strength_{number}"]) for number in numbers]


def without_leftovers(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """An `execute` for inputs that come and go with a choice.

    A graph that a program sends may still connect what another option had: ComfyUI then hands it
    over under its full name, `target.clip`, which no other input has a dot in.
    """

    @wraps(execute)
    def executing(cls: Any, **inputs: Any) -> io.NodeOutput:
        return execute(cls, **{name: value for name, value in inputs.items() if "." not in name})

    return executing


def notes(
    *lines: str, warnings: Iterable[str] = (), table: Sequence[Sequence[str]] = ()
) -> dict[str, Any]:
    """What a node says of its run: web/js/node_notes.js draws it. The first row of a table is its
    head.
    """
    return {"lines": lines, "warnings": list(warnings), "table": table}


def told(
    *lines: str,
    warnings: Iterable[str] = (),
    table: Sequence[Sequence[str]] = (),
    **more: Any,
) -> dict[str, Any]:
    """What a node shows of itself after it ran: its notes, as `text` too for those who read the
    history.
    """
    shown = notes(*lines, warnings=warnings, table=table)
    text = "\n".join([*lines, *("\t".join(row) for row in table), *shown["warnings"]])
    return {"custom_diffusion": [shown], "text": [text], **more}
