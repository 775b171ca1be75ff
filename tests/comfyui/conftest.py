"""Fixtures for the tests that run against a real ComfyUI server on the CPU."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from support import checkpoints as builders
from support.comfy_server import ComfyServer, find_comfyui

NO_COMFYUI = "NO COMFYUI: set COMFYUI_PATH to a ComfyUI work tree to run this test"
DAY_S = 24 * 60 * 60

CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "sd15": partial(builders.write_sd15, vae="kl"),
    "sd15_wide": partial(builders.write_sd15, channel_mult=(1, 2), vae="kl"),
    "sd15_scaled_float8": builders.write_sd15_scaled_float8,
    "sd2_eps": partial(builders.write_sd2, v_prediction=False, vae="kl"),
    "sd2_v": partial(builders.write_sd2, v_prediction=True, vae="kl"),
    "dit": builders.write_dit,
}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(NO_COMFYUI in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.section("ComfyUI not found", red=True)
        terminalreporter.write_line(f"{count} tests skipped. {NO_COMFYUI}", red=True)


@pytest.fixture(scope="module", autouse=True)
def memory_goes_back() -> Iterator[None]:
    """Whole models were loaded in this process: glibc keeps some of what is freed, gigabytes of it
    after a few files.
    """
    yield
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    path = find_comfyui()
    if path is None:
        pytest.skip(NO_COMFYUI)
    return path


@pytest.fixture(scope="session")
def checkpoint_file() -> Callable[[str], Path]:
    """Return a function that gives the file of a random checkpoint, written on first use.

    Files are kept between runs, in a folder named after the code that builds them: 4 GB. Folders of
    other code go when no run has used them for a day.
    """
    code = Path(builders.__file__).read_bytes() + Path(__file__).read_bytes()
    version = hashlib.sha256(code).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / "custom-diffusion-test-checkpoints" / version
    folder.mkdir(parents=True, exist_ok=True)
    folder.touch()
    for other in folder.parent.iterdir():
        if time.time() - other.stat().st_mtime > DAY_S:
            shutil.rmtree(other, ignore_errors=True)  # another process may be at it as well

    def build(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        with FileLock(folder / f"{name}.lock"):  # another test process may want it as well
            return path if path.exists() else CHECKPOINTS[name](path)

    return build


@pytest.fixture(scope="session")
def checkpoints(comfyui_path: Path, checkpoint_file: Callable[[str], Path]) -> Path:
    """Return the folder that holds the random checkpoint ``sd15.safetensors``."""
    return checkpoint_file("sd15").parent


@pytest.fixture(scope="module")
def base(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Base folder of the server that a file of tests has for itself. Trainings write gigabytes, so
    it goes with the server, unless a test of the file has failed.
    """
    folder = tmp_path_factory.mktemp(request.path.stem)
    failed = request.session.testsfailed
    yield folder
    if request.session.testsfailed == failed:
        shutil.rmtree(folder, ignore_errors=True)  # a process that was killed may write still


@pytest.fixture(scope="module")
def built_in_captions(base: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the server of a file computes of the built-in captions serves the other files too: a
    thousand captions through CLIP take forty seconds of a core.
    """
    run = tmp_path_factory.getbasetemp()
    shared = (run.parent if "PYTEST_XDIST_WORKER" in os.environ else run) / "caption factors"
    shared.mkdir(exist_ok=True)
    cache = base / "user" / "custom_diffusion" / "cache"
    cache.parent.mkdir(parents=True)
    cache.symlink_to(shared, target_is_directory=True)


@pytest.fixture(scope="session")
def server(
    comfyui_path: Path, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    """Run one server with the pack and the SD 1.5 checkpoint for the whole session."""
    base = tmp_path_factory.mktemp("comfy")
    with ComfyServer(comfyui_path, base, checkpoints=[checkpoints / "sd15.safetensors"]) as running:
        yield running


@dataclass(frozen=True)
class Loaded:
    """MODEL, CLIP and VAE as CheckpointLoaderSimple hands them out."""

    model: Any
    clip: Any
    vae: Any


@pytest.fixture(scope="session")
def comfy(comfyui_path: Path) -> Any:
    """ComfyUI's `comfy` package in this process, on the CPU."""
    sys.path.append(str(comfyui_path))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.lora
    import comfy.sd
    import comfy.utils
    import utils.extra_config  # noqa: F401  as main.py does, before ComfyUI's nodes hide it

    return comfy


@pytest.fixture(scope="session")
def embeddings_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture(scope="module")
def load(
    comfy: Any, checkpoint_file: Callable[[str], Path], embeddings_folder: Path
) -> Callable[[str], Loaded]:
    """Loads a random checkpoint in inference mode, as a prompt does; once a module."""

    @cache
    def load_checkpoint(name: str) -> Loaded:
        with torch.inference_mode():
            model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
                str(checkpoint_file(name)), embedding_directory=[str(embeddings_folder)]
            )
        return Loaded(model, clip, vae)

    return load_checkpoint


@pytest.fixture(scope="module")
def sd15(load: Callable[[str], Loaded]) -> Loaded:
    return load("sd15")


@pytest.fixture(scope="module")
def shapes(sd15: Loaded) -> dict[str, tuple[int, int]]:
    """Of the keys and values of SD 1.5's checkpoint, by layer."""
    weights = sd15.model.model.diffusion_model.named_parameters()
    return {
        name.removesuffix(".weight"): tuple(weight.shape)
        for name, weight in weights
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }
