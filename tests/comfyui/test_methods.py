"""Every training method in a real ComfyUI, and a whole UNet in its own loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from custom_diffusion.concept.file import read_concept
from custom_diffusion.trainer.config import MethodName
from support.comfy_server import ComfyServer
from support.graphs import draw, draw_pictures, node, teach

PROMPT = "photo of a <new1> cat"


@pytest.fixture(scope="module")
def bench(
    comfyui_path: Path,
    checkpoint_file: Callable[[str], Path],
    base: Path,
) -> Iterator[ComfyServer]:
    draw_pictures(base / "input" / "cat")
    draw_pictures(base / "input" / "mug", seed=1)
    with ComfyServer(comfyui_path, base, checkpoints=[checkpoint_file("sd15")]) as running:
        yield running


def picture(server: ComfyServer, graph: dict[str, dict[str, object]]) -> np.ndarray:
    return server.images(server.run(graph), "image")[0].astype(int)


@pytest.mark.parametrize("method", get_args(MethodName))
def test_a_method_teaches_saves_and_draws(bench: ComfyServer, method: MethodName) -> None:
    name = method.replace(" ", "-")
    extra = {"rank": 2} if method == "low-rank" else {}
    taught = teach(name, "cat", "cat", "<new1>", method=method, **extra)
    changed = picture(bench, {**taught, **draw(PROMPT, [name, 0])})
    concept = read_concept(bench.models / "custom_diffusion" / f"{name}.safetensors")
    assert concept.provenance["method"] == method
    counts = {"custom diffusion": 22, "values only": 11, "low-rank": 22, "cross-attention": 44}
    assert len(concept.deltas) == counts.get(method, 0)

    graph = {**load(name), **draw(PROMPT, ["loaded", 0])}
    loaded = picture(bench, graph)
    assert np.abs(loaded - changed).max() <= 2, "half precision of the file"

    unet = bench.models / "diffusion_models" / f"{name}.safetensors"
    assert unet.exists() == (method in ("dreambooth", "fine-tune all"))
    if unet.exists():
        graph["unet"] = node("UNETLoader", unet_name=unet.name, weight_dtype="default")
        graph["applied"]["inputs"]["model"] = ["unet", 0]
        assert np.abs(picture(bench, graph) - loaded).max() > 2, "the UNet has learnt"


def test_one_more_concept_is_learnt_on_top(bench: ComfyServer) -> None:
    first = {**teach("first", "cat", "cat", "<new1>"), **draw(PROMPT, ["first", 0])}
    bench.run(first)
    second = teach("second", "mug", "mug", "<new2>", steps=1, learning_rate=1e-7)
    second["second"]["inputs"]["start"] = ["loaded", 0]
    both_words = "photo of a <new1> cat and a <new2> mug"
    bench.run({**load("first"), **second, **draw(both_words, ["second", 0])})
    start, both = (
        read_concept(bench.models / "custom_diffusion" / f"{name}.safetensors")
        for name in ("first", "second")
    )
    assert [token.name for token in both.tokens] == ["<new1>", "<new2>"]
    assert both.deltas.keys() == start.deltas.keys()
    for layer, delta in start.deltas.items():
        error = (both.deltas[layer].dense() - delta.dense()).abs().max()
        assert error < 1e-3 * delta.dense().abs().max() + 1e-6


def load(name: str) -> dict[str, dict[str, object]]:
    return {"loaded": node("LoadConcept", concept_name=f"{name}.safetensors", rename_token="")}
