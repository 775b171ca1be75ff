"""Every shipped workflow, opened in a real browser and run by a real ComfyUI."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import page_of
from support.comfy_server import ComfyServer
from support.graphs import draw_pictures

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
# What makes a run small enough for a test; everything else stays as shipped.
SMALL = {
    "CustomDiffusionTrain": {"method.steps": 2, "batch_size": 2, "resolution": 64},
    "EmptyLatentImage": {"width": 64, "height": 64},
    "KSampler": {"steps": 2},
    "CheckpointLoaderSimple": {"ckpt_name": "sd15.safetensors"},
}


@pytest.fixture(scope="module")
def bench(
    comfyui_path: Path, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("workflows")
    for seed, name in enumerate(("cat", "mug", "regularization_cat", "regularization_mug")):
        draw_pictures(base / "input" / name, seed=seed)
    with ComfyServer(comfyui_path, base, checkpoints=[checkpoints / "sd15.safetensors"]) as running:
        yield running


@pytest.fixture(scope="module")
def open_in_browser(bench: ComfyServer) -> Iterator[Callable[[Any], dict[str, Any]]]:
    """Opens a workflow in ComfyUI's page and returns the prompt that its Run button would send."""
    with page_of(bench) as page:

        def open_workflow(workflow: Any) -> dict[str, Any]:
            script = "async w => { await app.loadGraphData(w); return await app.graphToPrompt(); }"
            return page.evaluate(script, workflow)["output"]

        yield open_workflow


def test_there_is_a_workflow() -> None:
    assert WORKFLOWS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_opens_and_runs(
    bench: ComfyServer, open_in_browser: Callable[[Any], dict[str, Any]], path: Path
) -> None:
    graph = open_in_browser(json.loads(path.read_text(encoding="utf-8")))
    assert {"CustomDiffusionTrain", "ApplyKVDelta"} & {n["class_type"] for n in graph.values()}
    for node in graph.values():
        node["inputs"].update(SMALL.get(node["class_type"], {}))
    entry = bench.run(graph)
    (saved,) = (key for key, node in graph.items() if node["class_type"] == "SaveImage")
    (image,) = bench.images(entry, saved)
    assert image.shape == (64, 64, 3) and image.std() > 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_has_a_thumbnail(path: Path) -> None:
    assert path.with_suffix(".jpg").is_file()
