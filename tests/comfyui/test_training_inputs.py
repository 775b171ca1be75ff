"""The inputs of the training nodes: as the first version had them, because saved graphs know the
values of widgets by their place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.comfy_server import ComfyServer

FIRST = json.loads(
    (Path(__file__).parents[1] / "support" / "training_inputs_0_1_0.json").read_text("utf-8")
)
"""Node → what /object_info of version 0.1.0 said of its inputs, but for the words."""
_, _cut = FIRST["CustomDiffusionTrain"]["required"]["gradient_cut"]
_cut |= {"default": "own words", "options": [*_cut["options"], "own words"]}
_, _resolution = FIRST["CustomDiffusionTrain"]["required"]["resolution"]
_resolution |= {"default": 0, "min": 0}
_, _method = FIRST["CustomDiffusionTrain"]["required"]["method"]
_steps = _method["options"][0]["inputs"]["required"]["steps"]
_followed = [_steps[0], {**_steps[1], "default": 0, "min": 0}]
_automatic = {"key": "automatic", "inputs": {"required": {"steps": _followed}}}
_method["options"].insert(0, _automatic)
"""Defaults that are others on purpose; what graphs have stored is still to be chosen."""
FIRST["CustomDiffusionViews"]["required"]["resolution"][1].update(_resolution)
for _name in ("resolution", "seed", "augment", "flip", "fit"):
    FIRST["CustomDiffusionViews"]["required"][_name][1]["advanced"] = True
"""Folded, because Views takes the settings of its Train node."""


WORDS = ("tooltip", "label_on", "label_off", "display_name")


def without_words(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {key: without_words(value) for key, value in schema.items() if key not in WORDS}
    return [without_words(value) for value in schema] if isinstance(schema, list) else schema


@pytest.mark.parametrize("node", FIRST)
def test_inputs_keep_their_place_kind_default_and_bounds(server: ComfyServer, node: str) -> None:
    now = without_words(server.object_info(node)["input"])
    assert now["required"] == without_words(FIRST[node]["required"])
    assert list(now["required"]) == list(FIRST[node]["required"])
    before = without_words(FIRST[node].get("optional", {}))
    optional = list(now.get("optional", {}).items())
    assert optional[: len(before)] == list(before.items()), "new ones come last"
