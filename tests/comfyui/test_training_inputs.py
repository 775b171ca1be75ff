"""The inputs of the training nodes: as the first version had them, because saved graphs know the
values of widgets by their place.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from custom_diffusion.cli import parser
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
_values_only = {**_method["options"][0], "key": "values only"}
_method["options"][:1] = [_automatic, _method["options"][0], _values_only]
for _node in ("CustomDiffusionTrain", "CustomDiffusionViews"):
    _, _fit = FIRST[_node]["required"]["fit"]
    _fit |= {"default": "buckets", "options": ["buckets", *_fit["options"]]}
_, _optimizer = FIRST["CustomDiffusionTrain"]["optional"]["optimizer"]
_optimizer["options"] += ["prodigy", "adamw schedule-free"]
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


OF_THE_HOST = {
    **dict.fromkeys(("model", "clip", "vae"), "--model holds all three"),
    **dict.fromkeys(("wait", "share_device", "keep_on_interrupt"), "prompts beside a training"),
    "concepts": "given folder by folder, see IN_OTHER_WORDS",
    "options": "a node of their own",
}
"""Inputs of the nodes that no command line can have → why"""
IN_OTHER_WORDS = {
    **{"name": "output", "folder": "images", "modifier_token": "token"},
    **{"regularization_folder": "regularization", "regularization_set": "regularization"},
    **{"masks": "images", "captions": "images"},  # files beside the pictures
}
"""Input → the command's option that says the same"""
OF_THE_COMMAND = {
    *("help", "model", "prediction", "device", "precision"),  # what ComfyUI's loaders decide
    *("jobs", "whole", "style"),  # where jobs are kept; another way to save; another to say kind
}


def test_what_the_nodes_can_the_command_can_and_the_other_way_round(server: ComfyServer) -> None:
    """No setting may come to one of them alone."""
    inputs: set[str] = set()
    for node in ("CustomDiffusionConcept", "CustomDiffusionTrain", "CustomDiffusionOptions"):
        groups = server.object_info(node)["input"]
        for group in ("required", "optional"):
            for name, (kind, *options) in groups[group].items():
                inputs.add(name)
                if kind == "COMFY_DYNAMICCOMBO_V3":
                    choices = options[0]["options"]
                    inputs |= {own for one in choices for own in one["inputs"]["required"]}
    parser = train_parser()
    said = {
        text.removeprefix("--").removeprefix("no-").replace("-", "_")
        for action in parser._actions
        for text in action.option_strings
        if text.startswith("--")
    }
    assert not OF_THE_HOST.keys() - inputs and not IN_OTHER_WORDS.keys() - inputs
    expected = {IN_OTHER_WORDS.get(name, name) for name in inputs - OF_THE_HOST.keys()}
    assert said - OF_THE_COMMAND == expected


def test_choices_and_bounds_of_both_are_the_same(server: ComfyServer) -> None:
    """Where a setting is a choice; numbers are checked by the one table."""
    concept = server.object_info("CustomDiffusionConcept")["input"]["required"]
    options = train_parser()._option_string_actions
    assert list(options["--kind"].choices or ()) == choices_of(concept["kind"])
    train = server.object_info("CustomDiffusionTrain")["input"]
    for name in ("gradient_cut", "fit", "optimizer"):
        found = {**train["required"], **train["optional"]}[name]
        option = options[f"--{name.replace('_', '-')}"]
        assert list(option.choices or ()) == choices_of(found)


def choices_of(schema: Any) -> list[str]:
    kind, options = schema
    return list(kind if isinstance(kind, list) else options["options"])


def train_parser() -> argparse.ArgumentParser:
    (commands,) = (one for one in parser()._actions if hasattr(one, "choices") and one.choices)
    found: argparse.ArgumentParser = commands.choices["train"]  # type: ignore[index, call-overload]
    return found
