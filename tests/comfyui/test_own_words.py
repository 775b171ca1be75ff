"""A training at a concept's own words in a real server: what it leaves, and that it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from custom_diffusion.concept.delta import LowRankDelta
from custom_diffusion.concept.file import read_concept
from support.comfy_server import ComfyServer
from support.graphs import Graph, draw, draw_pictures, node, teach

ROWS = 4  # token and noun in '<new1> cat' and in 'photo of a <new1> cat'
NAME = "mine"


@pytest.fixture(scope="module")
def bench(
    comfyui_path: Path,
    checkpoint_file: Callable[[str], Path],
    base: Path,
    built_in_captions: None,
) -> Iterator[ComfyServer]:
    """A server that has taught a concept, which was given regularization pictures for nothing."""
    draw_pictures(base / "input" / "cat")
    draw_pictures(base / "input" / "others", seed=5)
    with ComfyServer(comfyui_path, base, checkpoints=[checkpoint_file("sd15")]) as running:
        settings = {"learning_rate": 1e-2, "gradient_cut": "own words"}
        running.run(teach(NAME, "cat", "cat", "<new1>", "others", **settings))
        yield running


def saved(bench: ComfyServer, name: str = NAME) -> Path:
    return bench.models / "custom_diffusion" / f"{name}.safetensors"


def loaded() -> Graph:
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"),
        "cat": node("LoadConcept", concept_name=f"{NAME}.safetensors", rename_token=""),
    }


def test_its_file_is_its_projection_and_the_job_keeps_the_whole(bench: ComfyServer) -> None:
    concept = read_concept(saved(bench))
    assert concept.scope == "own words"
    assert concept.provenance["projected_on_rows"] == ROWS
    assert concept.provenance["regularization_images"] == 0
    for delta in concept.deltas.values():
        assert isinstance(delta, LowRankDelta) and delta.rank == ROWS
    (whole,) = (bench.output / "custom_diffusion" / "jobs").glob("*/concepts/*.safetensors")
    kept = read_concept(whole)
    assert kept.scope == "own words" and "projected_on_rows" not in kept.provenance
    assert saved(bench).stat().st_size < whole.stat().st_size


def test_the_job_says_what_was_not_needed(bench: ComfyServer) -> None:
    (job,) = bench.get("/custom_diffusion/jobs")["jobs"]
    assert any("regularization pictures were not used" in note for note in job["notes"])


def test_routed_it_draws_another_picture_and_without_its_words_the_base_models(
    bench: ComfyServer,
) -> None:
    def picture(text: str, routed: bool) -> np.ndarray:
        graph = draw(text)
        if routed:
            inputs = {"concepts": "1", "concepts.concept_1": ["cat", 0], "concepts.strength_1": 1.0}
            graph |= loaded()
            graph["route"] = node(
                "RouteConcepts", model=["checkpoint", 0], clip=["checkpoint", 1], **inputs
            )
            graph["sampler"]["inputs"]["model"] = ["route", 0]
            for prompt in ("positive", "negative"):
                graph[prompt]["inputs"]["clip"] = ["route", 1]
        (image,) = bench.images(bench.run(graph), "image")
        return image

    assert np.array_equal(picture("a cat", routed=True), picture("a cat", routed=False))
    words = "photo of a <new1> cat"
    assert not np.array_equal(picture(words, routed=True), picture(words, routed=False))


def test_a_node_projects_what_was_taught_through_every_word(bench: ComfyServer) -> None:
    graph = teach("every", "cat", "cat", "<new1>")
    graph["small"] = node(
        "CompressConcept",
        concept=["every", 0],
        **{"target": "own words", "target.clip": ["checkpoint", 1]},
    )
    graph["save"] = node("SaveConcept", concept=["small", 0], name="small", precision="half (fp16)")
    bench.run(graph)
    small, every = read_concept(saved(bench, "small")), read_concept(saved(bench, "every"))
    assert every.scope == small.scope == "every word"
    assert small.provenance["projected_on_rows"] == ROWS + 2  # and the end of each prompt
    assert saved(bench, "small").stat().st_size < saved(bench, "every").stat().st_size
