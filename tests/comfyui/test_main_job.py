"""The main job over ComfyUI's HTTP API: teach two concepts, merge them, draw with both."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from custom_diffusion.concept.delta import LowRankDelta
from custom_diffusion.concept.file import read_concept
from custom_diffusion.merge.captions import regularization_captions
from support.comfy_server import ComfyPromptError, ComfyServer
from support.graphs import draw, draw_pictures, merge, node, teach
from support.websocket import watch

BOTH = "a (<new1> cat:1.2) beside a <new2> dog"


@pytest.fixture(scope="module")
def bench(comfyui_path: Path, checkpoints: Path, base: Path) -> Iterator[ComfyServer]:
    """A server that forgets results, with two folders of pictures and some captions."""
    for seed, name in enumerate(("cat", "dog", "regularization")):
        draw_pictures(base / "input" / name, seed=seed)
    draw_pictures(base / "input" / "captioned")
    (base / "input" / "captioned" / "0.txt").write_text("a drawing of a <new1> cat")
    text = "\n".join(regularization_captions(120))
    (base / "input" / "captions.txt").write_text(text, encoding="utf-8")
    checkpoint = checkpoints / "sd15.safetensors"
    with ComfyServer(
        comfyui_path, base, checkpoints=[checkpoint], arguments=["--cache-none"]
    ) as running:
        yield running


@pytest.fixture(scope="module")
def base_picture(bench: ComfyServer) -> np.ndarray:
    return picture(bench, draw("photo of a cat"))


@pytest.fixture(scope="module")
def main_job(bench: ComfyServer, base_picture: np.ndarray) -> dict[str, Any]:
    """The whole graph, run once: the entry of ComfyUI's history."""
    graph = {
        **draw(BOTH, ["merged", 0]),
        **teach(
            "my-cat",
            "cat",
            "cat",
            "<new1>",
            "regularization",
            steps=3,
            augment=True,
            flip=True,
        ),
        **teach("my-dog", "dog", "dog", "<new2>", "regularization", batch_size=4, steps=1),
        "merged": merge(["my-cat", 0], ["my-dog", 0], strengths=(1.0, 0.8)),
        "saved": node(
            "SaveConcept", concept=["merged", 0], name="cat and dog", precision="half (fp16)"
        ),
    }
    return bench.run(graph)


def picture(server: ComfyServer, graph: dict[str, Any]) -> np.ndarray:
    return server.images(server.run(graph), "image")[0]


def concepts(server: ComfyServer) -> Path:
    return server.models / "custom_diffusion"


def job_folders(server: ComfyServer, name: str) -> list[Path]:
    return sorted((server.output / "custom_diffusion" / "jobs").glob(f"*-{name}*"))


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen in {timeout_s} s"
        time.sleep(0.1)


def losses(folder: Path) -> list[float]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["loss"] for line in lines]


def test_two_concepts_are_taught_merged_saved_and_drawn(
    bench: ComfyServer, main_job: dict[str, Any]
) -> None:
    image = bench.images(main_job, "image")[0]
    assert image.shape == (64, 64, 3) and image.std() > 1
    cat = read_concept(concepts(bench) / "my-cat.safetensors")
    assert [t.name for t in cat.tokens] == ["<new1>"] and len(cat.deltas) == 22
    assert cat.provenance["steps"] == 3 and cat.provenance["regularization_images"] == 3
    both = read_concept(concepts(bench) / "cat-and-dog.safetensors")
    assert [t.name for t in both.tokens] == ["<new1>", "<new2>"]
    assert all(isinstance(d, LowRankDelta) and d.rank == 12 for d in both.deltas.values())
    report = main_job["outputs"]["merged"]["text"][0]
    assert "12 constraint rows" in report


def test_loaded_model_draws_the_same_afterwards(
    bench: ComfyServer, main_job: dict[str, Any], base_picture: np.ndarray
) -> None:
    assert np.array_equal(picture(bench, draw("photo of a cat")), base_picture)


def test_saved_concept_draws_what_the_taught_one_draws(
    bench: ComfyServer, main_job: dict[str, Any]
) -> None:
    loaded = {"both": node("LoadConcept", concept_name="cat-and-dog.safetensors", rename_token="")}
    again = picture(bench, {**draw(BOTH, ["both", 0]), **loaded})
    first = bench.images(main_job, "image")[0]
    difference = np.abs(again.astype(int) - first.astype(int))
    assert difference.max() <= 2  # half precision of the file


def test_strength_zero_draws_the_base_picture(
    bench: ComfyServer, main_job: dict[str, Any], base_picture: np.ndarray
) -> None:
    loaded = {"both": node("LoadConcept", concept_name="cat-and-dog.safetensors", rename_token="")}
    at_zero = {**draw("photo of a cat", ["both", 0], strength=0.0), **loaded}
    at_one = {**draw("photo of a cat", ["both", 0]), **loaded}
    assert np.array_equal(picture(bench, at_zero), base_picture)
    assert not np.array_equal(picture(bench, at_one), base_picture)


def test_renamed_token_is_the_same_word(bench: ComfyServer, main_job: dict[str, Any]) -> None:
    def load(name: str) -> dict[str, Any]:
        return {"c": node("LoadConcept", concept_name="my-cat.safetensors", rename_token=name)}

    own = picture(bench, {**draw("a <new1> cat", ["c", 0]), **load("")})
    renamed = picture(bench, {**draw("a <tom> cat", ["c", 0]), **load("<tom>")})
    assert np.array_equal(own, renamed)


def test_a_job_leaves_its_settings_and_metrics(
    bench: ComfyServer, main_job: dict[str, Any]
) -> None:
    (folder,) = job_folders(bench, "my-cat")
    settings = json.loads((folder / "job.json").read_text())
    assert settings["concepts"] == [{"token": "<new1>", "class_noun": "cat"}]
    assert settings["config"]["steps"] == 3
    assert len(losses(folder)) == 3


def test_a_thing_and_a_style_are_taught_together_into_one_file(bench: ComfyServer) -> None:
    graph = {**teach("cat-in-style", "cat", "cat", "<new1>"), **teach("-", "dog", "art", "<new2>")}
    graph["--data"]["inputs"]["kind"] = "style"
    graph["cat-in-style"]["inputs"]["concepts.concept1"] = ["--data", 0]
    del graph["-"]
    bench.run(graph)
    taught = read_concept(concepts(bench) / "cat-in-style.safetensors")
    assert [(token.name, token.class_noun) for token in taught.tokens] == [
        ("<new1>", "cat"),
        ("<new2>", "art"),
    ]
    assert taught.constraint_prompts[3] == "painting in the style of <new2> art"


def test_connected_images_and_captions_teach_too(bench: ComfyServer) -> None:
    graph = teach("from-images", "none", "cat", "<new1>", steps=1)
    data = graph["from-images-data"]["inputs"]
    data["images"], data["captions"] = ["dataset", 0], ["captions", 0]
    graph["dataset"] = node("LoadImageDataSetFromFolder", folder="cat")
    graph["captions"] = node("PrimitiveString", value="a drawing of a <new1> cat")
    with pytest.raises(ComfyPromptError, match=r"1 captions were given for 3 pictures"):
        bench.run(graph)
    del data["captions"], graph["captions"]
    bench.run(graph)
    assert (
        read_concept(concepts(bench) / "from-images.safetensors").provenance["instance_images"] == 3
    )


def test_a_dataset_of_comfyui_brings_its_captions(bench: ComfyServer) -> None:
    """Its list of texts has an empty one where a picture has no caption."""
    folder = bench.input / "captioned"
    graph = teach("from-dataset", "none", "cat", "<new1>", steps=1)
    data = graph["from-dataset-data"]["inputs"]
    data["images"], data["captions"] = ["dataset", 0], ["dataset", 1]
    graph["dataset"] = node("LoadImageTextDataSetFromFolder", folder=folder.name)
    bench.run(graph)
    (folder / "0.txt").write_text("a drawing of a cat")
    graph["from-dataset"]["inputs"]["seed"] = 1
    (text,) = bench.run(graph)["outputs"]["from-dataset-data"]["text"]
    assert "put into captions without it: picture 1 ('a drawing of a <new1> cat')" in text


def test_interrupting_saves_what_was_learnt(bench: ComfyServer) -> None:
    prompt = bench.queue(teach("stopped", "cat", "cat", "<new1>", steps=10_000))
    wait_until(lambda: any(len(losses(f)) > 2 for f in job_folders(bench, "stopped")), "training")
    bench.interrupt(prompt)
    with pytest.raises(ComfyPromptError) as caught:
        bench.wait(prompt)
    assert caught.value.interrupted
    concept = read_concept(concepts(bench) / "stopped.safetensors")
    (folder,) = job_folders(bench, "stopped")
    assert 2 < concept.provenance["steps"] == len(losses(folder)) < 10_000


def test_background_training_leaves_the_queue_usable(
    bench: ComfyServer, base_picture: np.ndarray
) -> None:
    graph = teach("background", "cat", "cat", "<new1>", steps=8, wait=False)
    graph["shown"] = node("PreviewAny", source=["background", 2])
    graph["never"] = node(
        "SaveConcept", concept=["background", 0], name="never", precision="half (fp16)"
    )
    entry = bench.run(graph)
    (folder,) = job_folders(bench, "background")
    assert entry["outputs"]["shown"]["text"] == [folder.name]
    assert np.array_equal(picture(bench, draw("photo of a cat")), base_picture)
    steps_when_drawn = len(losses(folder))
    saved = concepts(bench) / "background.safetensors"
    wait_until(saved.exists, "the background training")
    assert steps_when_drawn < 8 == len(losses(folder))
    assert not (concepts(bench) / "never.safetensors").exists()


def test_progress_and_previews_reach_the_browser(bench: ComfyServer) -> None:
    graph = teach("watched", "cat", "cat", "<new1>", steps=4, preview_every_steps=4)
    messages = watch(
        bench, lambda client: bench.post("/prompt", {"prompt": graph, "client_id": client})
    )
    done = [
        m["data"]["value"] / m["data"]["max"]
        for m in messages
        if isinstance(m, dict) and m["type"] == "progress"
    ]
    assert done == sorted(done)  # one bar, from the first picture that is encoded to the end
    assert 0 < done[0] <= 0.1 and done[-1] > 0.7 and len(set(done)) > 4
    assert any(isinstance(m, bytes) and b"JFIF" in m for m in messages)
