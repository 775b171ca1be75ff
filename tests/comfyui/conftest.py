"""Fixtures for the tests that run against a real ComfyUI server on the CPU."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from support import checkpoints as builders
from support.comfy_server import ComfyServer, find_comfyui

NO_COMFYUI = "NO COMFYUI: set COMFYUI_PATH to a ComfyUI work tree to run this test"

CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "sd15": partial(builders.write_sd15, vae="kl"),
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


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    path = find_comfyui()
    if path is None:
        pytest.skip(NO_COMFYUI)
    return path


@pytest.fixture(scope="session")
def checkpoint_file() -> Callable[[str], Path]:
    """Return a function that gives the file of a random checkpoint, written on first use.

    Files are kept between runs, in a folder named after the code that builds them.
    """
    code = Path(builders.__file__).read_bytes() + Path(__file__).read_bytes()
    version = hashlib.sha256(code).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / "custom-diffusion-test-checkpoints" / version

    def build(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        return path if path.exists() else CHECKPOINTS[name](path)

    return build


@pytest.fixture(scope="session")
def checkpoints(comfyui_path: Path, checkpoint_file: Callable[[str], Path]) -> Path:
    """Return the folder that holds the random checkpoint ``sd15.safetensors``."""
    return checkpoint_file("sd15").parent


@pytest.fixture(scope="session")
def server(
    comfyui_path: Path, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    """Run one server with the pack and the SD 1.5 checkpoint for the whole session."""
    base = tmp_path_factory.mktemp("comfy")
    with ComfyServer(comfyui_path, base, checkpoints=[checkpoints / "sd15.safetensors"]) as running:
        yield running
