"""Wrong files and wrong graphs in a real ComfyUI: each message says what to do."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.file import write_concept
from safetensors.torch import save_file
from support.comfy_server import ComfyPromptError, ComfyServer
from support.graphs import draw, draw_pictures, merge, node, teach
from support.made_concepts import made_concept

LAYER = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"


@pytest.fixture(scope="module")
def bench(
    comfyui_path: Path,
    checkpoint_file: Callable[[str], Path],
    base: Path,
) -> Iterator[ComfyServer]:
    inputs, concepts = base / "input", base / "models" / "custom_diffusion"
    draw_pictures(inputs / "cat")
    draw_pictures(inputs / "one-corrupt")
    content = (inputs / "one-corrupt" / "1.png").read_bytes()
    (inputs / "one-corrupt" / "1.png").write_bytes(content[: len(content) // 2])
    (inputs / "empty").mkdir()
    draw_pictures(inputs / "dated" / "20240612_holiday")
    draw_pictures(inputs / "endless")
    (inputs / "endless" / "0.png").unlink()
    (inputs / "endless" / "0.png").symlink_to("/dev/zero")
    (inputs / "endless" / "broken.txt").symlink_to("nothing")
    (inputs / "captions.txt").write_text("a cat\n" * 5)

    concepts.mkdir(parents=True)
    good = made_concept({LAYER: (320, 768)})
    write_concept(good, concepts / "good.safetensors")
    write_concept(made_concept({LAYER: (640, 2048)}, family="sdxl"), concepts / "sdxl.safetensors")
    whole = (concepts / "good.safetensors").read_bytes()
    (concepts / "truncated.safetensors").write_bytes(whole[:-1000])
    (concepts / "pickle.safetensors").write_bytes(pickle.dumps({"unet": {}}))
    save_file({"lora_unet_x.alpha": torch.ones(1)}, concepts / "lora.safetensors")

    nan = {
        f"diffusion_model.{LAYER.replace('to_k', 'to_q')}.diff": torch.full((320, 320), torch.nan)
    }
    loras = base / "models" / "loras"
    loras.mkdir(parents=True)
    save_file(nan, loras / "nan.safetensors")
    checkpoints = [checkpoint_file("sd15"), checkpoint_file("dit")]
    with ComfyServer(comfyui_path, base, checkpoints=checkpoints) as running:
        yield running


def load(name: str) -> dict[str, Any]:
    return node("LoadConcept", concept_name=f"{name}.safetensors", rename_token="")


def taught(**changes: Any) -> dict[str, Any]:
    """A training graph with inputs of its nodes replaced, `data_folder="empty"` and the like."""
    graph = teach("bad", "cat", "cat", "<new1>")
    for name, value in changes.items():
        key, _, field = name.partition("_")
        graph[{"data": "bad-data", "train": "bad"}[key]]["inputs"][field] = value
    graph["dit"] = node("CheckpointLoaderSimple", ckpt_name="dit.safetensors")
    graph["nan"] = node(
        "LoraLoaderModelOnly",
        model=["checkpoint", 0],
        lora_name="nan.safetensors",
        strength_model=1.0,
    )
    return graph


BAD = {
    "no images at all": (
        taught(data_folder="none"),
        r"There are no pictures yet\. Press 'Choose pictures'.*or connect images",
    ),
    "folder without pictures": (
        taught(data_folder="empty"),
        r"empty holds no pictures.*Put 4 to 20",
    ),
    "one corrupt picture": (
        taught(data_folder="one-corrupt"),
        r"1\.png cannot be read as a picture.*Remove it",
    ),
    "a date that would be millions of repeats": (
        taught(data_folder="dated"),
        r"each of its pictures counts 20240612 times.*1 to 1000\. Rename it",
    ),
    "a device called a picture": (
        taught(data_folder="endless"),
        r"0\.png cannot be read as a picture \(it is a device, not a file\)",
    ),
    "token without brackets": (
        taught(data_modifier_token="cat"),
        r"'cat' would be read as ordinary text.*Write '<cat>'",
    ),
    "no class noun": (taught(data_class_noun=" "), r"class noun is empty.*Write"),
    "initializer of several pieces": (
        taught(data_initializer="antidisestablishment"),
        r"is \d pieces.*one whole word",
    ),
    "no text encoder": (taught(train_clip=["dit", 1]), r"No CLIP was given.*Connect the CLIP"),
    "not a UNet": (taught(train_model=["dit", 0]), r"has no cross-attention.*load a checkpoint of"),
    "loss is not a number": (
        taught(train_model=["nan", 0]),
        r"loss became nan at step 1.*before this step changed anything.*the UNet itself makes .*"
        r"without LoRAs",
    ),
    "truncated concept": (
        {**draw("a cat", ["c", 0]), "c": load("truncated")},
        r"truncated\.safetensors is not a readable concept file.*again",
    ),
    "pickle called safetensors": (
        {**draw("a cat", ["c", 0]), "c": load("pickle")},
        r"bare pickle, which can run code when opened: ask for it as \.safetensors",
    ),
    "nothing of a LoRA that a concept can hold": (
        {**draw("a cat", ["c", 0]), "c": load("lora")},
        r"lora\.safetensors is no concept and nothing that can be made one.*can be read",
    ),
    "SDXL concept on SD 1.5": (
        {**draw("a cat", ["c", 0]), "c": load("sdxl")},
        r"trained on Stable Diffusion XL \(text width 2048\); this model is Stable Diffusion 1\.x "
        r"\(768\)\. Load",
    ),
    "too few captions": (
        {
            **draw("a cat", ["m", 0]),
            "m": merge(["c", 0], ["d", 0]),
            "c": load("good"),
            "d": load("good"),
        },
        r"captions\.txt holds 5 captions",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_message_says_what_was_given_needed_and_to_do(bench: ComfyServer, name: str) -> None:
    graph, message = BAD[name]
    with pytest.raises(ComfyPromptError, match=r"(?s)" + message):
        bench.run(graph)


def test_two_concepts_with_the_same_token_are_refused(bench: ComfyServer) -> None:
    graph = {
        **draw("a cat", ["m", 0]),
        "m": merge(["c", 0], ["d", 0]),
        "c": load("good"),
        "d": load("good"),
    }
    graph["m"]["inputs"]["regularization_captions"] = "built-in"
    with pytest.raises(ComfyPromptError, match=r"(?s)Two concepts use.*<new1>.*Rename"):
        bench.run(graph)


def test_nothing_half_written_is_left(bench: ComfyServer) -> None:
    for name in BAD:
        with pytest.raises(ComfyPromptError):
            bench.run(BAD[name][0])
    left = {path.name for path in (bench.models / "custom_diffusion").iterdir()}
    assert left == {f"{n}.safetensors" for n in ("good", "sdxl", "truncated", "pickle", "lora")}
