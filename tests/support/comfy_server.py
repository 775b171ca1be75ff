"""Finding a real ComfyUI and running its server as a child process.

Tests of the nodes, the HTTP routes and the shutdown path are only worth something against the real
host, so this module starts it on the CPU, on a free loopback port, with a base directory of its
own, and talks to it over HTTP with nothing but the standard library.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from .preloaded import Forked

REPOSITORY = Path(__file__).resolve().parents[2]
PACK_FOLDER = "ComfyUI-Custom-Diffusion"

# Keeps the frontend's first-run dialogs and its external requests away from browser tests.
SETTINGS: Mapping[str, Any] = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.27.10",
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.ColorPalette": "dark",
    "Comfy.Minimap.Visible": False,
    "Comfy.Locale": "en",
    "Comfy.UseNewMenu": "Top",
    "Comfy.VueNodes.Enabled": False,
}

_FOLDERS = (
    "models/checkpoints",
    "models/loras",
    "models/embeddings",
    "models/custom_diffusion",
    "custom_nodes",
    "input",
    "output",
    "temp",
    "user/default",
)
_LOG_TAIL = 4000


class ComfyServerError(RuntimeError):
    """The server did not start, died, or answered a request with an HTTP error."""

    def __init__(self, message: str, *, status: int | None = None, body: Any = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = body


class ComfyPromptError(RuntimeError):
    """A prompt was refused, failed while running, or was interrupted."""

    def __init__(
        self,
        message: str,
        *,
        node_errors: Mapping[str, Any] | None = None,
        details: Mapping[str, Any] | None = None,
        interrupted: bool = False,
    ) -> None:
        super().__init__(message)
        self.node_errors = dict(node_errors or {})
        self.details = dict(details or {})
        self.interrupted = interrupted


def is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def find_comfyui() -> Path | None:
    """Return ComfyUI's folder: COMFYUI_PATH, the one around this repository, or ~/comfy/ComfyUI."""
    configured = os.environ.get("COMFYUI_PATH")
    if configured:
        candidates = [Path(configured).expanduser()]
    else:
        candidates = [Path.home() / "comfy" / "ComfyUI"]
        if REPOSITORY.parent.name == "custom_nodes":
            candidates.insert(0, REPOSITORY.parents[1])
    return next((path.resolve() for path in candidates if is_comfyui(path)), None)


class ComfyServer:
    """A ComfyUI server process; use it as a context manager, or call ``start`` and ``stop``.

    A context ends by force; ``stop`` ends as a user does.

    ``base`` may be reused by a second server to test what survives a restart. A server that is not
    ``preloaded`` is a process of its own from its first line on, as a user's is.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        *,
        pack: Path | None = REPOSITORY,
        checkpoints: Iterable[Path] = (),
        arguments: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        threads: int = 1,
        start_timeout: float = 180.0,
        preloaded: bool = True,
    ) -> None:
        self.comfyui = comfyui
        self.base = base
        self.pack = pack
        self.arguments = tuple(arguments)
        self.environment = dict(environment or {})
        self.settings = {**SETTINGS, **(settings or {})}
        self.threads = threads
        self.start_timeout = start_timeout
        as_all = threads == 1 and not self.environment and "COMFYUI_PYTHON" not in os.environ
        self.preloaded = preloaded and as_all and os.name != "nt"
        self.log_path = base / "server.log"
        self.port = 0
        self.process: subprocess.Popen[bytes] | Forked | None = None
        self._prepare(checkpoints)

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def models(self) -> Path:
        return self.base / "models"

    @property
    def input(self) -> Path:
        return self.base / "input"

    @property
    def output(self) -> Path:
        return self.base / "output"

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def add_checkpoint(self, path: Path) -> str:
        """Make a checkpoint available, also to a running server; return its name in the menus."""
        _link(path, self.models / "checkpoints" / path.name)
        return path.name

    def start(self, port: int | None = None) -> None:
        """On this port, or on any that is free."""
        if self.process is not None:
            raise ComfyServerError("the server is already running")
        self.port = port or _free_port()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONDONTWRITEBYTECODE": "",  # compiling ComfyUI anew costs every start two seconds
            "PYTHONUNBUFFERED": "1",
            **self.environment,
        }
        if self.preloaded:
            command = self._command()[2:]
            self.process = Forked(self.comfyui, command, environment, self.log_path)
        else:
            self.process = self._run(environment)
        try:
            self._await_ready()
        except BaseException:
            self.stop()
            raise

    def _run(self, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                self._command(),
                cwd=self.comfyui,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=None if os.name == "nt" else _restore_interrupt,
            )

    def stop(self, timeout: float = 30.0) -> int | None:
        """End the server as Ctrl-C does, by force after ``timeout``; return its exit status."""
        process, self.process = self.process, None
        if process is None:
            return None
        if process.poll() is None:
            if os.name == "nt":
                process.terminate()
            else:
                process.send_signal(signal.SIGINT)
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def kill(self) -> None:
        """End the server at once: nobody looks at what it leaves, and taking all its modules apart
        costs it two seconds.
        """
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()

    def get(self, path: str, *, timeout: float = 60.0) -> Any:
        """Return the decoded JSON answer of a GET request, or None for an empty one."""
        return _decode(self._request(path, timeout=timeout))

    def get_bytes(self, path: str, *, timeout: float = 60.0) -> bytes:
        return self._request(path, timeout=timeout)

    def post(self, path: str, body: Any = None, *, timeout: float = 60.0) -> Any:
        """Send ``body`` as JSON; return the decoded JSON answer, or None for an empty one."""
        return _decode(self._request(path, data=json.dumps(body).encode(), timeout=timeout))

    def delete(self, path: str) -> Any:
        return _decode(self._request(path, timeout=60.0, method="DELETE"))

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """Return the description of every node, or of one node (empty when it is unknown)."""
        if node is None:
            return self.get("/object_info")
        return self.get(f"/object_info/{urllib.parse.quote(node)}").get(node, {})

    def queue(self, graph: Mapping[str, Any]) -> str:
        """Queue a prompt in API format and return its id."""
        try:
            return self.post("/prompt", {"prompt": graph})["prompt_id"]
        except ComfyServerError as error:
            if error.status != 400 or not isinstance(error.body, dict):
                raise
            raise _refusal(error.body) from error

    def wait(self, prompt_id: str, timeout: float = 300.0) -> dict[str, Any]:
        """Wait for the end of a prompt and return its history entry."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return _checked(entry)
            time.sleep(0.05)
        raise TimeoutError(f"prompt {prompt_id} not done after {timeout} s\n{self._tail()}")

    def run(self, graph: Mapping[str, Any], timeout: float = 300.0) -> dict[str, Any]:
        return self.wait(self.queue(graph), timeout)

    def interrupt(self, prompt_id: str | None = None) -> None:
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def images(self, entry: Mapping[str, Any], node: str | None = None) -> list[np.ndarray]:
        """Return the images of a history entry as height x width x channel arrays of bytes."""
        outputs = entry["outputs"]
        chosen = outputs.values() if node is None else [outputs[node]]
        return [self._image(record) for output in chosen for record in output.get("images", ())]

    def _prepare(self, checkpoints: Iterable[Path]) -> None:
        for folder in _FOLDERS:
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        settings = self.base / "user" / "default" / "comfy.settings.json"
        if not settings.exists():
            settings.write_text(json.dumps(self.settings), encoding="utf-8")
        if self.pack is not None:
            _link(self.pack, self.base / "custom_nodes" / PACK_FOLDER)
        for path in checkpoints:
            self.add_checkpoint(path)

    def _command(self) -> list[str]:
        return [
            os.environ.get("COMFYUI_PYTHON") or sys.executable,
            "main.py",
            "--cpu",
            "--disable-auto-launch",
            "--disable-api-nodes",
            "--database-url",
            f"sqlite:///{self.base / 'user' / 'comfyui.db'}",
            "--base-directory",
            str(self.base),
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            *self.arguments,
        ]

    def _await_ready(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline:
            status = self.process.poll()
            if status is not None:
                raise ComfyServerError(f"ComfyUI ended with status {status}\n{self._tail()}")
            try:
                self.get("/system_stats", timeout=5.0)
                return
            except OSError:
                time.sleep(0.1)
        raise ComfyServerError(f"ComfyUI is not ready after {self.start_timeout} s\n{self._tail()}")

    def _request(
        self, path: str, *, timeout: float, data: bytes | None = None, method: str | None = None
    ) -> bytes:
        headers = {} if data is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with _OPENER.open(request, timeout=timeout) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            body = _lenient(error.read())
            raise ComfyServerError(
                f"{path}: HTTP {error.code}: {body}", status=error.code, body=body
            ) from error

    def _image(self, record: Mapping[str, str]) -> np.ndarray:
        query = urllib.parse.urlencode(
            {key: record[key] for key in ("filename", "subfolder", "type")}
        )
        with Image.open(io.BytesIO(self.get_bytes(f"/view?{query}"))) as image:
            return np.asarray(image)

    def _tail(self) -> str:
        return self.log()[-_LOG_TAIL:]


# A proxy named in the environment must not come between the tests and the loopback interface.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _restore_interrupt() -> None:
    """Undo an inherited "ignore": a job started in the background would never see Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _link(source: Path, target: Path) -> None:
    if not target.exists():
        target.symlink_to(source.resolve(), target_is_directory=source.is_dir())


def _decode(content: bytes) -> Any:
    return json.loads(content) if content else None


def _lenient(content: bytes) -> Any:
    """Decode an error page, which is JSON or else plain text."""
    try:
        return _decode(content)
    except ValueError:
        return content.decode(errors="replace")


def _refusal(body: Mapping[str, Any]) -> ComfyPromptError:
    node_errors = body.get("node_errors") or {}
    error = body.get("error")
    lines = [str(error.get("message", error)) if isinstance(error, dict) else str(error)]
    for node, record in node_errors.items():
        for problem in record.get("errors", ()):
            text = f"{problem.get('message')}: {problem.get('details')}"
            lines.append(f"node {node} ({record.get('class_type')}): {text}")
    return ComfyPromptError("\n".join(lines), node_errors=node_errors, details=body)


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the history entry of a successful prompt; raise for any other."""
    status = entry["status"]
    if status["completed"]:
        return entry
    messages = dict(status["messages"])
    if "execution_interrupted" in messages:
        raise ComfyPromptError("the prompt was interrupted", details=entry, interrupted=True)
    failure = messages.get("execution_error", {})
    raise ComfyPromptError(
        f"node {failure.get('node_id')} ({failure.get('node_type')}): "
        f"{failure.get('exception_type')}: {failure.get('exception_message')}",
        details=entry,
    )
