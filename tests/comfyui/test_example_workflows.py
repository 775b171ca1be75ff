"""Every shipped workflow, opened in a real browser and run by a real ComfyUI."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.comfy_server import ComfyServer
from support.graphs import draw_pictures

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
READY = """
window.app?.extensionManager?.workflow?.activeWorkflow?.isLoaded
    && !!window.LiteGraph?.registered_node_types?.ConceptMerge
"""
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
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("NO CHROMIUM: install it to run the workflows in a browser")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page()
        page.route(
            lambda url: not url.startswith(bench.url), lambda route: route.abort("blockedbyclient")
        )
        page.goto(bench.url)
        page.wait_for_function(READY, timeout=60_000)

        def open_workflow(workflow: Any) -> dict[str, Any]:
            script = "async w => { await app.loadGraphData(w); return await app.graphToPrompt(); }"
            return page.evaluate(script, workflow)["output"]

        yield open_workflow
        browser.close()


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
