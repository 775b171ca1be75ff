"""A regularization set that the loaded model draws in the graph, against ComfyUI's own nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from custom_diffusion.concept.file import read_concept
from custom_diffusion.host.open_clip.text import MODEL
from PIL import Image
from safetensors.torch import load_file, save_file
from support.clip_weights import write_text_half
from support.comfy_server import ComfyPromptError, ComfyServer
from support.graphs import Graph, draw, draw_pictures, node, teach

COUNT = 3


@pytest.fixture(scope="module")
def bench(
    comfyui_path: Path,
    checkpoint_file: Callable[[str], Path],
    base: Path,
) -> Iterator[ComfyServer]:
    """A server that forgets results."""
    draw_pictures(base / "input" / "cat")
    draw_pictures(base / "input" / "ordinary", seed=1)
    for folder, caption in (("a", "photo of a cat"), ("b", "a dog on the beach")):
        draw_pictures(base / "input" / "collection" / folder)
        for picture in (base / "input" / "collection" / folder).glob("*.png"):
            picture.with_suffix(".txt").write_text(caption)
    write_other_models(checkpoint_file("sd15"), base / "models")
    write_text_half(base / "models" / "text_encoders" / "clip.safetensors")
    with ComfyServer(
        comfyui_path, base, checkpoints=[checkpoint_file("sd15")], arguments=["--cache-none"]
    ) as running:
        yield running


def write_other_models(checkpoint: Path, models: Path) -> None:
    """The checkpoint's own autoencoder, but for one bias, and a LoRA of one layer of its text."""
    weights = load_file(checkpoint)
    start = "first_stage_model."
    vae = {k.removeprefix(start): v.clone() for k, v in weights.items() if k.startswith(start)}
    vae["decoder.conv_out.bias"] += 0.1
    (models / "vae").mkdir(parents=True, exist_ok=True)
    save_file(vae, models / "vae" / "other.safetensors")
    key = next(k for k in weights if k.endswith("text_model.encoder.layers.0.mlp.fc1.weight"))
    height, width = weights[key].shape
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    (models / "loras").mkdir(parents=True, exist_ok=True)
    lora = {
        f"{name}.lora_up.weight": torch.full((height, 1), 0.1),
        f"{name}.lora_down.weight": torch.full((1, width), 0.1),
    }
    save_file(lora, models / "loras" / "text.safetensors")


def drawn_set(count: int = COUNT, **changes: Any) -> dict[str, Any]:
    settings = {
        "class_noun": "cat",
        "count": count,
        "seed": 7,
        "steps": 2,
        "cfg": 5.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "resolution": 64,
        "batch_size": 2,
        **changes,
    }
    models = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "vae": ["checkpoint", 2]}
    return node("DrawRegularization", **models, **settings)


def taught(name: str, drawn: dict[str, Any], folder: str = "none") -> Graph:
    graph = {
        **teach(name, "cat", "cat", "<new1>", folder, steps=1, batch_size=2),
        "set": drawn,
    }
    graph[f"{name}-data"]["inputs"]["regularization_set"] = ["set", 0]
    return graph


def folders(server: ComfyServer) -> list[Path]:
    return sorted((server.output / "custom_diffusion" / "regularization").glob("*"))


def pictures(folder: Path) -> dict[str, int]:
    """Names of the pictures, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("*.png"))}


def test_the_model_draws_the_class_once_and_a_training_uses_it(bench: ComfyServer) -> None:
    bench.run(taught("first", drawn_set()))
    (folder,) = folders(bench)
    assert folder.name.startswith("cat-")
    written = pictures(folder)
    assert list(written) == ["00000.png", "00001.png", "00002.png"]
    assert (folder / "00001.txt").read_text() == "photo of a cat"
    concept = read_concept(bench.models / "custom_diffusion" / "first.safetensors")
    assert concept.provenance["regularization_images"] == COUNT

    bench.run(taught("again", drawn_set(count=COUNT + 1)))
    more = pictures(folder)
    assert folders(bench) == [folder] and len(more) == COUNT + 1
    assert written.items() <= more.items(), "what was there was not drawn again"

    bench.run(taught("other", drawn_set(seed=8)))
    assert len(folders(bench)) == 2 and pictures(folder) == more


def test_another_clip_or_vae_draws_another_set(bench: ComfyServer) -> None:
    """As another model does; the same ones, loaded again, draw nothing."""
    plain = drawn_set(count=1, seed=11)

    def found() -> set[Path]:
        return {path for path in folders(bench) if '"seed": 11' in settings(path)}

    bench.run(taught("plain", plain))
    assert len(found()) == 1
    skip = node("CLIPSetLastLayer", clip=["checkpoint", 1], stop_at_clip_layer=-2)
    vae = node("VAELoader", vae_name="other.safetensors")
    lora = node(
        "LoraLoader",
        **{"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "lora_name": "text.safetensors"},
        strength_model=0.0,
        strength_clip=1.0,
    )
    for count, (name, changed, sources) in enumerate(
        [
            ("clip", ["skip", 0], {"skip": skip}),
            ("vae", ["vae", 0], {"vae": vae}),
            ("clip", ["lora", 1], {"lora": lora}),
        ],
        start=2,
    ):
        one = {**plain, "inputs": {**plain["inputs"], name: changed}}
        for _ in range(2):
            bench.run({**taught("changed", one), **sources})
        assert len(found()) == count, changed
    bench.run(taught("plain again", plain))
    assert len(found()) == 4


def test_its_pictures_are_those_of_comfyuis_own_nodes(bench: ComfyServer) -> None:
    """A batch of as many from the same seed."""
    bench.run(taught("stock", drawn_set()))
    graph = draw("photo of a cat")
    graph["empty"]["inputs"]["batch_size"] = COUNT
    stock = bench.images(bench.run(graph), "image")
    (folder,) = (path for path in folders(bench) if '"seed": 7' in settings(path))
    for number, wanted in enumerate(stock):
        own = np.asarray(Image.open(folder / f"{number:05}.png"))
        assert np.abs(own.astype(int) - wanted.astype(int)).max() <= 1


def settings(folder: Path) -> str:
    """Empty where the folder has just been made."""
    file = folder / "settings.json"
    return file.read_text() if file.exists() else ""


def test_a_noun_of_any_length_has_a_folder(bench: ComfyServer) -> None:
    noun = "very " * 55 + "old ca\u0301t"
    before = folders(bench)
    bench.run(taught("long", drawn_set(count=1, class_noun=noun)))
    (folder,) = set(folders(bench)) - set(before)
    assert folder.name.startswith("very-very-") and len(folder.name.encode()) < 143
    assert (folder / "00000.txt").read_text(encoding="utf-8") == f"photo of a {noun}"


def test_interrupted_it_keeps_what_is_drawn_and_goes_on(bench: ComfyServer) -> None:
    slow = drawn_set(count=40, seed=9)
    prompt = bench.queue(taught("slow", slow))
    end = time.monotonic() + 120
    while not (found := [path for path in folders(bench) if '"seed": 9' in settings(path)]) or (
        len(pictures(found[0])) < 2
    ):
        assert time.monotonic() < end
        time.sleep(0.05)
    bench.interrupt(prompt)
    with pytest.raises(ComfyPromptError):
        bench.wait(prompt)
    kept = pictures(found[0])
    assert 2 <= len(kept) < 40
    fewer = len(kept) + 1
    bench.run(taught("resumed", drawn_set(count=fewer, seed=9)))
    after = pictures(found[0])
    assert kept.items() <= after.items() and len(after) == fewer


def retrieved_set(**changes: Any) -> dict[str, Any]:
    settings = {
        "collection": "collection",
        "class_noun": "cat",
        "count": 200,
        "similarity": 0.999,
        "clip_model": MODEL,
        "clip_weights": "clip.safetensors",
    }
    return node("RetrieveRegularization", **{**settings, **changes})


def test_a_set_is_retrieved_from_a_collection(bench: ComfyServer) -> None:
    bench.run(taught("retrieved", retrieved_set()))
    concept = read_concept(bench.models / "custom_diffusion" / "retrieved.safetensors")
    assert concept.provenance["regularization_images"] == 3, "those of cats"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"class_noun": "mug"}, "No caption .* is as near as 0.999"),
        ({"collection": "none"}, "No collection was chosen"),
        ({"clip_model": "no-such-model"}, "is not known"),
        ({"clip_model": "hf-hub:owner/repo"}, "nothing is looked up"),
        ({"clip_model": "local-dir:/tmp"}, "nothing is looked up"),
        ({"clip_weights": "none"}, "Put open_clip_model.safetensors"),
        ({"clip_weights": "openai"}, "There are no 'openai'"),
        ({"clip_weights": "/etc/passwd"}, "There are no"),
        ({"clip_weights": "../checkpoints/sd15.safetensors"}, "There are no"),
    ],
)
def test_what_cannot_be_retrieved_is_said(
    bench: ComfyServer, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(ComfyPromptError, match=message):
        bench.run(taught("none", retrieved_set(**changes)))


def test_a_set_and_a_folder_together_are_refused(bench: ComfyServer) -> None:
    with pytest.raises(ComfyPromptError, match="Disconnect the set"):
        bench.run(taught("both", drawn_set(), folder="ordinary"))
