"""Every shipped workflow, opened in a real browser and run by a real ComfyUI."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from custom_diffusion.concept.file import write_concept
from custom_diffusion.formats.base import read_base
from custom_diffusion.formats.exporting import export_concept
from custom_diffusion.trainer.config import TrainConfig
from PIL import Image
from support.browser import page_of
from support.comfy_server import ComfyServer
from support.graphs import Graph, draw_pictures
from support.made_concepts import made_concept

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted(
    (ROOT / "example_workflows").glob("*.json"), key=lambda path: int(path.name.split()[0])
)
FOLDERS = {"cat": "cat", "mug": "mug", "art": "sketches"}
"""Class noun → a folder of pictures, which a person gives"""
SAVED = {
    "my-cat.safetensors": "<new1> cat",
    "my-mug.safetensors": "<new1> mug",
    "my-other-cat.safetensors": "<new1> cat",
}
OTHER, OTHER_WORDS = "delta.bin", "<new1> cat"
"""Of another tool, which does not say the noun"""
# What makes a run small enough for a test; everything else stays as shipped.
SMALL = {
    "CustomDiffusionTrain": {"method.steps": 2, "batch_size": 1, "resolution": 64},
    "CustomDiffusionViews": {"resolution": 64},
    "EmptyLatentImage": {"width": 64, "height": 64},
    "KSampler": {"steps": 2},
    "BasicScheduler": {"steps": 2},
    "CheckpointLoaderSimple": {"ckpt_name": "sd15.safetensors"},
}
APPLYING = ("ApplyKVDelta", "RouteConcepts", "ApplyRegions")
TOLD = {
    "CompressConcept": "times smaller",
    "InspectConcept": "fits the model: yes",
    "SaveConcept": ".safetensors, ",
    "ExportConcept": ".safetensors, ",
}
"""What nodes say after a run"""
OPEN = """async workflow => {
    await app.loadGraphData(workflow);
    const boxes = app.graph._nodes.map(node => [node.title, ...node.getBounding()]);
    return {graph: (await app.graphToPrompt()).output, boxes};
}"""

Box = tuple[str, float, float, float, float]
"""Title, left, top, width and height of a node."""


@dataclass(frozen=True)
class Opened:
    """A workflow in ComfyUI's page: the prompt of its Run button, and where its nodes are."""

    graph: Graph
    boxes: list[Box]


Open = Callable[[Path], Opened]
every_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def bench(
    comfyui_path: Path, checkpoints: Path, base: Path, built_in_captions: None
) -> Iterator[ComfyServer]:
    for seed, folder in enumerate(FOLDERS.values()):
        draw_pictures(base / "input" / folder, count=1, seed=seed)
    server = ComfyServer(comfyui_path, base, checkpoints=[checkpoints / "sd15.safetensors"])
    layer = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    folder = server.models / "custom_diffusion"
    for name, words in SAVED.items():
        write_concept(made_concept({layer: (320, 768)}, *words.split()), folder / name)
    base_model = read_base(checkpoints / "sd15.safetensors")
    small = made_concept({layer: (320, 768)}, *OTHER_WORDS.split(), scale=1e-3)
    export_concept(small, folder / OTHER, "adobe", base_model)
    with server:
        yield server


@pytest.fixture(scope="module")
def open_in_browser(bench: ComfyServer) -> Iterator[Open]:
    with page_of(bench) as page:

        @cache
        def open_workflow(path: Path) -> Opened:
            workflow = json.loads(path.read_text(encoding="utf-8"))
            return Opened(**page.evaluate(OPEN, workflow))

        yield open_workflow


def inputs_of(graph: Graph, *class_types: str) -> list[dict[str, Any]]:
    return [node["inputs"] for node in graph.values() if node["class_type"] in class_types]


def test_there_is_a_workflow() -> None:
    assert WORKFLOWS


@every_workflow
def test_workflow_opens_and_runs(bench: ComfyServer, open_in_browser: Open, path: Path) -> None:
    graph = {
        key: {**node, "inputs": {**node["inputs"], **SMALL.get(node["class_type"], {})}}
        for key, node in open_in_browser(path).graph.items()
    }
    for inputs in inputs_of(graph, "CustomDiffusionConcept"):
        assert inputs["folder"] == "none"  # nobody has a folder of this name
        inputs["folder"] = FOLDERS[inputs["class_noun"]]
    assert inputs_of(graph, *APPLYING)
    entry = bench.run(graph)
    saved, sheets = (
        [bench.images(entry, key) for key, node in graph.items() if node["class_type"] == shown]
        for shown in ("SaveImage", "CustomDiffusionViews")
    )
    assert saved
    for (image,) in saved:
        assert image.shape == (64, 64, 3) and image.std() > 1
    for (sheet,) in sheets:
        assert sheet.shape[2] == 3 and sheet.std() > 1
    for key, node in graph.items():
        if node["class_type"] in TOLD:
            assert TOLD[node["class_type"]] in str(entry["outputs"][key]["text"])
    for inputs in inputs_of(graph, "ExportConcept"):
        assert (bench.models / "loras" / f"{inputs['name']}.safetensors").is_file()


@every_workflow
def test_workflow_leaves_to_the_model_what_follows_it(open_in_browser: Open, path: Path) -> None:
    graph = open_in_browser(path).graph
    recipe = TrainConfig().as_json()
    follows = {"method": "automatic", "steps": 0, "resolution": 0}
    for inputs in inputs_of(graph, "CustomDiffusionTrain", "CustomDiffusionViews"):
        given = {name.removeprefix("method."): value for name, value in inputs.items()}
        shared = given.keys() & recipe.keys()
        assert {"resolution", "seed", "augment", "flip", "fit"} <= shared
        expected = {**recipe, **follows}
        assert {name: given[name] for name in shared} == {name: expected[name] for name in shared}
    for inputs in inputs_of(graph, "CustomDiffusionViews"):
        assert inputs["model"] == [loader_of(graph), 0]  # or it could not follow it


@every_workflow
def test_inputs_that_came_later_have_their_defaults(open_in_browser: Open, path: Path) -> None:
    """The workflows were saved before; a choice of how many concepts stands before these inputs."""
    for inputs in inputs_of(open_in_browser(path).graph, "ApplyKVDelta", "RouteConcepts"):
        assert (inputs["start_percent"], inputs["end_percent"]) == (0, 1)


def loader_of(graph: Graph) -> str:
    (loader,) = (k for k, node in graph.items() if node["class_type"] == "CheckpointLoaderSimple")
    return loader


def test_names_are_a_path_to_learn_that_people_find() -> None:
    names = [path.stem for path in WORKFLOWS]
    assert [name.split()[0] for name in names] == [str(n) for n in range(1, len(names) + 1)]
    for words in ("Teach a concept", "train", "LoRA", "SDXL", "Merge two saved concepts"):
        assert any(words in name for name in names), words
    for name in names:  # they are parts of addresses, and of files on Windows
        assert re.fullmatch(r"[\w -]+", name)


@every_workflow
def test_new_words_are_used_where_they_are_known(open_in_browser: Open, path: Path) -> None:
    graph = open_in_browser(path).graph
    taught = inputs_of(graph, "CustomDiffusionConcept")
    loaded = inputs_of(graph, "LoadConcept")
    assert bool(taught) != bool(loaded)
    known = set()
    for inputs in loaded:
        name, noun = inputs["concept_name"], inputs.get("class_noun", "")
        words = OTHER_WORDS if (name, noun) == (OTHER, OTHER_WORDS.split()[1]) else SAVED[name]
        token, noun = words.split()
        known.add(f"{inputs['rename_token'] or token} {noun}")
    for inputs in taught:
        noun = inputs["class_noun"]
        assert inputs["regularization_folder"] == "none"  # words of their own need none
        known.add(f"{inputs['modifier_token']} {noun}")
    used = set()
    for sampler in inputs_of(graph, "KSampler", "IsolatedGuider"):
        key, _ = sampler["positive"]
        prompt = graph[key]["inputs"]
        words = re.findall(r"<[\w-]+> \w+", prompt.get("text", prompt.get("prompt")))
        source = graph[sampler["model"][0]]["class_type"]
        assert sampler["model"][0] in (prompt["clip"][0], key)  # a node with a prompt of its own
        assert source in (APPLYING if words else ("CheckpointLoaderSimple",))
        used.update(words)
    assert used == known


@every_workflow
def test_nodes_do_not_overlap(open_in_browser: Open, path: Path) -> None:
    for one, other in combinations(open_in_browser(path).boxes, 2):
        assert not overlap(one, other), f"{one[0]} and {other[0]}"


def overlap(one: Box, other: Box) -> bool:
    (_, x1, y1, width1, height1), (_, x2, y2, width2, height2) = one, other
    return x1 < x2 + width2 and x2 < x1 + width1 and y1 < y2 + height2 and y2 < y1 + height1


@every_workflow
def test_workflow_has_a_thumbnail(path: Path) -> None:
    thumbnail = path.with_suffix(".jpg")
    assert thumbnail.stat().st_size < 60_000
    with Image.open(thumbnail) as image:
        assert image.format == "JPEG" and image.width >= 640


@every_workflow
def test_the_page_can_offer_the_checkpoint_where_it_is_missing(path: Path) -> None:
    loaders = [
        node
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]
        if node["type"] == "CheckpointLoaderSimple"
    ]
    assert loaders
    for loader in loaders:
        (model,) = loader["properties"]["models"]
        assert model["name"] == loader["widgets_values"][0]
        assert model["directory"] == "checkpoints"
        assert model["url"].startswith("https://") and model["url"].endswith(f"/{model['name']}")
