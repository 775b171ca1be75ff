"""In which settings two trainings differ, by their jobs' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from custom_diffusion.cli import main
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.jobs.differences import differences
from custom_diffusion.trainer.jobs.records import Description, description_bytes


def description(graph: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    config = TrainConfig(**settings)
    return {
        "name": "cat",
        "created": 5.0,
        "steps": config.steps,
        "concepts": [{"token": "<new1>", "class_noun": "cat"}],
        "config": config.as_json(),
        "graph": graph or {},
        "node": "train",
    }


def nodes(checkpoint: str, folder: str, first: str = "1") -> dict[str, Any]:
    return {
        first: {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "data": {"class_type": "CustomDiffusionConcept", "inputs": {"folder": folder}},
        "train": {
            "class_type": "CustomDiffusionTrain",
            "inputs": {"model": [first, 0], "seed": 1, "share_device": folder == "cats"},
        },
    }


def parsed(values: dict[str, Any]) -> Description:
    return Description.parse(description_bytes(values))


def test_what_differs_is_named_and_nothing_else() -> None:
    one = parsed(description(nodes("a.safetensors", "cat"), steps=100, learning_rate=1e-5))
    other = description(nodes("b.safetensors", "cats", "7"), steps=100, learning_rate=2e-5, seed=3)
    other["start"] = "an earlier concept"
    other["name"], other["created"] = "another", 6.0
    assert differences(one, parsed(other)) == {
        "learning_rate": ("1e-05", "2e-05"),
        "seed": ("0", "3"),
        "start": (None, "an earlier concept"),
        "CheckpointLoaderSimple ckpt_name": ("a.safetensors", "b.safetensors"),
        "CustomDiffusionConcept folder": ("cat", "cats"),
    }
    assert differences(one, one) == {}


def test_files_of_strangers_make_no_trouble() -> None:
    whole = description(nodes("a", "cat"))
    odd: list[dict[str, Any]] = [
        {"config": 5, "concepts": "x" * 5000, "start": [[]]},
        {"graph": {"1": 5, "2": {"inputs": [1]}, "3": {"class_type": None, "inputs": {"a": 1}}}},
    ]
    for values in odd:
        found = differences(parsed(whole), parsed({**whole, **values}))
        assert found
        assert all(len(text) < 400 for pair in found.values() for text in pair if text)


def test_the_command_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rate in (("one", 1e-5), ("two", 2e-5)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps(description(learning_rate=rate)))
    assert main(["jobs", "differ", str(tmp_path), "one", "two"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["setting", "one", "two"],
        ["learning_rate", "1e-05", "2e-05"],
    ]
    assert main(["jobs", "differ", str(tmp_path), "one", "three"]) == 1
    assert "three" in capsys.readouterr().err
