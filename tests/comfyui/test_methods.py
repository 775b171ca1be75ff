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
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("methods")
    draw_pictures(base / "input" / "cat")
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
    counts = {"custom diffusion": 22, "low-rank": 22, "cross-attention": 44}
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


def load(name: str) -> dict[str, dict[str, object]]:
    return {"loaded": node("LoadConcept", concept_name=f"{name}.safetensors", rename_token="")}
