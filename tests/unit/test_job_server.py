"""`custom-diffusion jobs` at an address where something else answers, or somebody who means ill."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from custom_diffusion.cli import job_server, main

JOB = {"id": "a", "state": "paused", "error": "", "step": 1, "steps": 2, "concept_file": None}
ESCAPE = "\x1b[2J\x9b31m"


def http(body: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\n\r\n".encode() + body


def answer(value: Any, status: str = "200 OK") -> bytes:
    return http(json.dumps(value).encode(), status)


@pytest.fixture
def serve() -> Iterator[Callable[[bytes], str]]:
    """Starts a server that gives one answer to everything, and returns its address."""
    servers = []

    def start(content: bytes) -> str:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.recv(65536)
                self.request.sendall(content)

        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


COMMANDS = [
    ["list"],
    *(["show", "a"], ["losses", "a"], ["pause", "a"], ["move", "a", "0"]),
    *(["start", "a"], ["delete", "a"]),
]
STRANGE = {
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "nothing": b"",
    "a page": http(b"<html>"),
    "not UTF-8": http(b'{"jobs": "\xe9"}'),
    "deep": http(b"[" * 200_000),
    "deep refusal": http(b"[" * 200_000, "500 Fault"),
    "half a character": http(b'"\\ud800"'),
    "a number": answer(5),
    "cut short": http(b"{", length=50),
    "no chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a long header": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 1000 + b"\r\n",
    "a file": b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n",
    "a refusal of no words": answer({"error": {}}, "500 Fault"),
}


@pytest.mark.parametrize("content", STRANGE.values(), ids=STRANGE)
def test_what_is_no_answer_of_ours_is_an_error(
    serve: Callable[[bytes], str], capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    address = serve(content)
    for action, *rest in COMMANDS:
        assert main(["jobs", action, address, *rest]) == 1
        assert address.rstrip("/") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("action", "value"),
    [
        *((["list"], value) for value in ({}, {"jobs": "abc", "queue": []}, {"jobs": [None]})),
        (["list"], {"jobs": [{**JOB, "step": []}], "queue": []}),
        (["list"], {"jobs": [JOB], "queue": 5}),
        *((["losses", "a"], {"losses": value}) for value in (5, ["a"], [[]])),
        *((["show", "a"], value) for value in ({}, {**JOB, "error": None})),
        (["pause", "a"], {**JOB, "steps": "2"}),
        (["move", "a", "0"], {"queue": None}),
        *((["differ", "a", "b"], {"settings": value}) for value in (5, ["a"], {"a": 1})),
    ],
)
def test_an_answer_of_another_shape_is_an_error(
    serve: Callable[[bytes], str],
    capsys: pytest.CaptureFixture[str],
    action: list[str],
    value: Any,
) -> None:
    assert main(["jobs", action[0], serve(answer(value)), *action[1:]]) == 1
    assert "No ComfyUI with this pack answers" in capsys.readouterr().err


def test_an_answer_without_an_end_is_not_waited_for(
    serve: Callable[[bytes], str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_server, "_MOST_BYTES", 1 << 20)
    assert main(["jobs", "list", serve(http(b" " * (2 << 20), length=1 << 40))]) == 1
    assert "more than 1 MiB" in capsys.readouterr().err


def test_no_answer_rules_the_terminal(
    serve: Callable[[bytes], str], capsys: pytest.CaptureFixture[str]
) -> None:
    job = {**JOB, "id": ESCAPE, "state": ESCAPE, "error": ESCAPE, "concept_file": ESCAPE}
    address = serve(answer({**job, ESCAPE: ESCAPE, "jobs": [job], "queue": [ESCAPE]}))
    for action in (["list"], ["show", "a"], ["pause", "a"], ["move", "a", "0"]):
        assert main(["jobs", action[0], address, *action[1:]]) == 0
        shown = capsys.readouterr().out
        assert shown
        assert all(c.isprintable() or c == "\n" for c in shown)
    refusal = serve(answer({"error": ESCAPE}, "409 Conflict"))
    assert main(["jobs", "list", refusal]) == 1
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "address",
    ["file:///etc/passwd", "ftp://127.0.0.1/", "http://", "http://[", "http://a b", "http://a:x"],
)
def test_what_is_no_address_is_an_error(capsys: pytest.CaptureFixture[str], address: str) -> None:
    assert main(["jobs", "list", address]) == 1
    assert address.rstrip("/") in capsys.readouterr().err
