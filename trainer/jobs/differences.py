"""In which settings two trainings differ, as far as the files of their jobs say."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from .records import Description

_NO_SETTINGS = {"name", "created", "fingerprint", "graph", "node", "config", "ends_early"}
_MOST_LETTERS = 300
"""Of a value; a longer one is cut"""
Difference = tuple[str | None, str | None]
"""What the one has and what the other; None for a setting that it does not have"""


def differences(one: Description, other: Description) -> dict[str, Difference]:
    """Settings of the training by their names, those of the nodes before it, such as the checkpoint
    and the folder of pictures, as `CheckpointLoaderSimple ckpt_name`.
    """
    first, second = (dict(_settings(of)) for of in (one, other))
    return {
        name: (_shown(first.get(name)), _shown(second.get(name)))
        for name in {**first, **second}
        if first.get(name) != second.get(name)
    }


def _settings(of: Description) -> Iterator[tuple[str, str]]:
    config = of.content.get("config")
    for settings in (of.content, config if isinstance(config, dict) else {}):
        for name, value in settings.items():
            if name not in _NO_SETTINGS and value not in (None, ""):
                yield name, _text(value)
    yield from _of_nodes(of).items()


def _of_nodes(of: Description) -> dict[str, str]:
    """Values that stand on nodes, but not on the training's own, whose are settings already. Nodes
    of one kind are taken together, in any order: their numbers mean nothing.
    """
    found: dict[str, list[str]] = {}
    for key, node in of.graph.items():
        if key == of.content.get("node") or not isinstance(node, Mapping):
            continue
        inputs = node.get("inputs")
        for name, value in inputs.items() if isinstance(inputs, dict) else ():
            if not isinstance(value, (list, dict)):  # a link, or what a widget of a page keeps
                found.setdefault(f"{node.get('class_type')} {name}", []).append(_text(value))
    return {name: ", ".join(sorted(values)) for name, values in found.items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _shown(text: str | None) -> str | None:
    if text is None or len(text) <= _MOST_LETTERS:
        return text
    return f"{text[:_MOST_LETTERS]}… ({len(text)} letters)"
