"""Is the bench itself sound? These tests use stock nodes only, on a server without the pack."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.comfy_server import ComfyPromptError, ComfyServer, ComfyServerError

Graph = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def server_of_this_file(comfyui_path: Path, base: Path) -> Iterator[ComfyServer]:
    # Without a cache, the same prompt queued twice is computed twice.
    with ComfyServer(
        comfyui_path, base, pack=None, arguments=["--cache-none"], preloaded=False
    ) as running:
        yield running


@pytest.fixture
def stock_server(server_of_this_file: ComfyServer) -> ComfyServer:
    """Running, also when the test before has stopped it."""
    if server_of_this_file.process is None:
        server_of_this_file.start()
    return server_of_this_file


def text_to_image(checkpoint: str, *, text: str = "a cat", steps: int = 2, side: int = 64) -> Graph:
    return {
        "model": _node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "positive": _node("CLIPTextEncode", clip=["model", 1], text=text),
        "negative": _node("CLIPTextEncode", clip=["model", 1], text=""),
        "empty": _node("EmptyLatentImage", width=side, height=side, batch_size=1),
        "sampler": _node(
            "KSampler",
            model=["model", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            seed=7,
            steps=steps,
            cfg=5.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "latent": _node("SaveLatent", samples=["sampler", 0], filename_prefix="latents/bench"),
        "pixels": _node("VAEDecode", samples=["sampler", 0], vae=["model", 2]),
        "image": _node("SaveImage", images=["pixels", 0], filename_prefix="bench"),
    }


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _sample(server: ComfyServer, graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """Return the image and the latent that a prompt saves."""
    entry = server.run(graph)
    record = entry["outputs"]["latent"]["latents"][0]
    latent = load_file(server.output / record["subfolder"] / record["filename"])["latent_tensor"]
    return server.images(entry, "image")[0], latent


def test_server_describes_its_nodes(stock_server: ComfyServer) -> None:
    assert "KSampler" in stock_server.object_info()
    assert stock_server.object_info("KSampler")["output"] == ["LATENT"]
    assert stock_server.object_info("NoSuchNode") == {}


@pytest.mark.parametrize("name", ["sd15", "sd2_eps", "sd2_v"])
def test_random_checkpoint_gives_a_reproducible_image(
    stock_server: ComfyServer, checkpoint_file: Callable[[str], Path], name: str
) -> None:
    checkpoint = stock_server.add_checkpoint(checkpoint_file(name))
    image, latent = _sample(stock_server, text_to_image(checkpoint))
    again, latent_again = _sample(stock_server, text_to_image(checkpoint))
    other, _ = _sample(stock_server, text_to_image(checkpoint, text="a dog in the snow"))

    assert image.shape == (64, 64, 3)
    assert np.isfinite(latent).all()
    assert image.std() > 5.0
    assert np.array_equal(image, again)
    assert np.array_equal(latent, latent_again)
    assert not np.array_equal(image, other)


def test_prediction_type_of_sd2_is_controlled(
    stock_server: ComfyServer, checkpoint_file: Callable[[str], Path]
) -> None:
    names = [stock_server.add_checkpoint(checkpoint_file(name)) for name in ("sd2_eps", "sd2_v")]
    start = len(stock_server.log())
    latents = [_sample(stock_server, text_to_image(name))[1] for name in names]
    log = stock_server.log()[start:]

    assert log.index("model_type EPS") < log.index("model_type V_PREDICTION")
    # Both files hold the same weights, so only the prediction type can explain a difference.
    assert not np.allclose(latents[0], latents[1], atol=0.1)


def test_transformer_without_cross_attention_loads(
    stock_server: ComfyServer, checkpoint_file: Callable[[str], Path]
) -> None:
    graph = {
        "model": _node(
            "CheckpointLoaderSimple", ckpt_name=stock_server.add_checkpoint(checkpoint_file("dit"))
        ),
        "save": _node("ModelSave", model=["model", 0], filename_prefix="bench_dit"),
    }
    stock_server.run(graph)
    assert list(stock_server.output.glob("bench_dit*.safetensors"))


def test_refused_prompt_names_the_node(stock_server: ComfyServer) -> None:
    with pytest.raises(ComfyPromptError, match="CheckpointLoaderSimple.*absent") as caught:
        stock_server.queue(text_to_image("absent.safetensors"))
    assert "model" in caught.value.node_errors


def test_failed_prompt_names_the_node(
    stock_server: ComfyServer, checkpoint_file: Callable[[str], Path]
) -> None:
    checkpoint = stock_server.add_checkpoint(checkpoint_file("dit"))
    with pytest.raises(ComfyPromptError, match="CLIPTextEncode.*RuntimeError") as caught:
        stock_server.run(text_to_image(checkpoint))
    assert not caught.value.interrupted


def test_interrupt_ends_a_running_prompt(
    stock_server: ComfyServer, checkpoint_file: Callable[[str], Path]
) -> None:
    checkpoint = stock_server.add_checkpoint(checkpoint_file("sd15"))
    prompt = stock_server.queue(text_to_image(checkpoint, steps=10000))
    # ComfyUI forgets an interrupt that comes before the prompt has begun, so send it until it acts.
    while not stock_server.get(f"/history/{prompt}"):
        stock_server.interrupt(prompt)
        time.sleep(0.1)
    with pytest.raises(ComfyPromptError) as caught:
        stock_server.wait(prompt, timeout=60)
    assert caught.value.interrupted


def test_unknown_route_is_an_http_error(stock_server: ComfyServer) -> None:
    with pytest.raises(ComfyServerError) as caught:
        stock_server.get("/custom_diffusion/no_such_route")
    assert caught.value.status == 404


def test_stop_ends_the_server_cleanly(stock_server: ComfyServer) -> None:
    assert stock_server.stop() == 0
    assert stock_server.stop() is None


def test_failed_start_shows_the_log(comfyui_path: Path, tmp_path: Path) -> None:
    server = ComfyServer(comfyui_path, tmp_path, pack=None, arguments=["--no-such-argument"])
    with pytest.raises(ComfyServerError, match="no-such-argument"):
        server.start()
