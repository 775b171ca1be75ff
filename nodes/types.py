"""What the pack's nodes share: socket types, and how a node tells of its results in the page."""

from collections.abc import Iterable, Sequence
from typing import Any

from comfy_api.latest import io

CATEGORY = "custom diffusion"

Concept = io.Custom("CONCEPT")
TrainingConcept = io.Custom("TRAINING_CONCEPT")
RegularizationSet = io.Custom("REGULARIZATION_SET")


def told(
    *lines: str,
    warnings: Iterable[str] = (),
    table: Sequence[Sequence[str]] = (),
    **more: Any,
) -> dict[str, Any]:
    """What a node shows of itself after it ran: web/js/node_notes.js draws it, `text` is for those
    who read the history. The first row of a table is its head.
    """
    warned = list(warnings)
    shown = {"lines": lines, "warnings": warned, "table": table}
    text = "\n".join([*lines, *("\t".join(row) for row in table), *warned])
    return {"custom_diffusion": [shown], "text": [text], **more}
