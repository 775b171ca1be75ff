"""ComfyUI servers that are forked off one process, which has imported what they all import first.

That is most of a start: five of seven seconds of a core. ComfyUI's own modules, and the pack, each
server imports itself, from its own `main.py` with its own arguments.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

LIBRARIES = [
    *("torch", "torch._dynamo", "torch.export", "torchvision", "torchaudio", "torchsde"),
    *("transformers", "transformers.models.clip.modeling_clip", "tokenizers", "safetensors.torch"),
    *("scipy.stats", "scipy.ndimage", "einops", "PIL.Image", "yaml", "tqdm.auto", "av", "psutil"),
    *("aiohttp.web", "alembic.command", "sqlalchemy.orm", "pydantic", "jinja2", "kornia"),
]
"""Of those that are not there, none is missed."""


class Forked:
    """As far as tests need it, `subprocess.Popen` of such a server."""

    def __init__(
        self,
        comfyui: Path,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES)
        _start_forking(environment)
        given = (str(comfyui), list(arguments), dict(environment), str(log))
        self._process = context.Process(target=_serve, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (status := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired("main.py", timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _start_forking(environment: Mapping[str, str]) -> None:
    """How many threads there are is read when a library is loaded."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(comfyui: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.dont_write_bytecode = False
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(comfyui)
    installed = (sys.prefix, sys.base_prefix)
    sys.path[:] = [comfyui, *(entry for entry in sys.path if entry.startswith(installed))]
    sys.argv = ["main.py", *arguments]
    runpy.run_path("main.py", run_name="__main__")
