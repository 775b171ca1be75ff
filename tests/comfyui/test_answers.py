"""What becomes of whatever a route raises or returns, and of more requests than there are threads:
routes that do so on purpose, in aiohttp's own server.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

aiohttp = pytest.importorskip("aiohttp", reason="NO COMFYUI: aiohttp comes with it")

from aiohttp import web  # noqa: E402
from aiohttp.test_utils import TestClient, TestServer  # noqa: E402
from custom_diffusion.concept.errors import (  # noqa: E402
    ConceptFileError,
    JobError,
    UnknownConceptError,
    UnknownJobError,
)
from custom_diffusion.host.comfyui.http.answers import Handler, answering  # noqa: E402
from custom_diffusion.host.comfyui.http.workers import Workers  # noqa: E402
from custom_diffusion.host.http.api import ENDPOINTS  # noqa: E402
from custom_diffusion.host.http.endpoint import Endpoint  # noqa: E402

MOVE = next(endpoint for endpoint in ENDPOINTS if endpoint.operation == "move_job")
SHOW = next(endpoint for endpoint in ENDPOINTS if endpoint.operation == "show_job")
LEFT = "The folder /jobs/cat could not be removed: checkpoints/ is left. Remove it by hand."


def workers(waiting: int = 8) -> Workers:
    return Workers("test", threads=1, waiting=waiting, retry_after_s=3)


def serve(
    handler: Handler,
    use: Callable[[TestClient[Any, Any]], Awaitable[Any]],
    *,
    endpoint: Endpoint = SHOW,
    line: Workers | None = None,
) -> Any:
    """What `use` makes of a server with one route."""

    async def run() -> Any:
        app = web.Application()
        answer = answering(endpoint, handler, line or workers())
        app.router.add_route(endpoint.method, endpoint.path, answer)
        async with TestClient(TestServer(app)) as client:
            return await use(client)

    return asyncio.run(run())


def asked(handler: Handler) -> tuple[int, Any]:
    """Status and JSON of one answer."""

    async def use(client: TestClient[Any, Any]) -> tuple[int, Any]:
        async with client.get("/jobs/cat%0Aforged%20line") as answer:
            assert answer.content_type == "application/json"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            text = await answer.text()
            return answer.status, json.loads(text, parse_constant=lambda name: 1 / 0)

    return serve(handler, use)  # type: ignore[no-any-return]


def raising(error: BaseException) -> Handler:
    def handler(sent: Any) -> Any:
        raise error

    return handler


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UnknownJobError("There is no such job."), 404),
        (UnknownConceptError("There is no such concept."), 404),
        (JobError(LEFT), 409),
        (ConceptFileError("It is damaged."), 409),
    ],
)
def test_an_error_of_ours_says_what_it_says(
    error: Exception, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert asked(raising(error)) == (status, {"error": str(error)})
    assert [record for record in caplog.records if record.name == "custom_diffusion"] == []


@pytest.mark.parametrize(
    "error",
    [
        ValueError("/secret/path"),
        TypeError("/secret/path"),
        KeyError("/secret/path"),
        FileNotFoundError(2, "gone", "/secret/path"),
        RuntimeError("/secret/path"),
        RecursionError("/secret/path"),
        MemoryError("/secret/path"),
        UnicodeEncodeError("utf-8", "/secret/path", 0, 1, "x"),
        StopIteration("/secret/path"),
        asyncio.TimeoutError("/secret/path"),
        web.HTTPFound("/secret/path"),
    ],
)
def test_any_other_error_is_logged_and_hidden(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    status, told = asked(raising(error))
    assert status == 500 and told.keys() == {"error"}
    assert type(error).__name__ in told["error"] and "secret" not in told["error"]
    (record,) = (each for each in caplog.records if each.name == "custom_diffusion")
    assert record.levelno == logging.ERROR and record.exc_info and record.exc_info[1] is error
    assert record.getMessage() == "GET /jobs/cat%0Aforged%20line failed"


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (
            {"a": float("nan"), "b": [float("inf"), -float("inf"), 1.5]},
            {"a": None, "b": [None, None, 1.5]},
        ),
        ({"name\ud800": "\udcff"}, {"name?": "?"}),
        (["\u2028", "<script>", "\U0001f408"], ["\u2028", "<script>", "\U0001f408"]),
    ],
)
def test_answers_are_json_whatever_they_hold(result: Any, told: Any) -> None:
    assert asked(lambda sent: result) == (200, told)


@pytest.mark.parametrize("result", [{"a": object()}, {1, 2}, b"bytes", {(1, 2): 3}])
def test_what_json_cannot_hold_is_a_fault_of_ours(result: Any) -> None:
    assert asked(lambda sent: result)[0] == 500


def test_what_refers_to_itself_is_a_fault_of_ours() -> None:
    endless: list[Any] = []
    endless.append(endless)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert asked(lambda sent: endless)[0] == asked(lambda sent: deep)[0] == 500


@pytest.mark.parametrize(
    ("content", "status", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n...", 200, "image/png"),
        (b"\xff\xd8\xff\xe0...", 200, "image/jpeg"),
        (b"RIFF\x04\0\0\0WEBPVP8 ", 200, "image/webp"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 409, "application/json"),
        (b"GIF89a", 409, "application/json"),
        (b"", 409, "application/json"),
        (None, 404, "application/json"),
    ],
)
def test_a_picture_is_what_its_content_is(
    content: bytes | None, status: int, kind: str, tmp_path: Path
) -> None:
    """Also the one that went away after it was found."""
    file = tmp_path / "page.html"
    if content is not None:
        file.write_bytes(content)

    async def use(client: TestClient[Any, Any]) -> tuple[int, str]:
        async with client.get("/jobs/cat") as answer:
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert (await answer.read() == content) is (status == 200)
            return answer.status, answer.content_type

    assert serve(lambda sent: file, use) == (status, kind)


def test_more_than_the_line_holds_are_sent_away() -> None:
    begun, may_end = threading.Event(), threading.Event()

    def handler(sent: Any) -> Any:
        begun.set()
        assert may_end.wait(60)
        return {}

    async def status(client: TestClient[Any, Any]) -> tuple[int, str | None]:
        async with client.get("/jobs/cat") as answer:
            assert answer.status == 200 or "Ask again in 3 s" in (await answer.json())["error"]
            return answer.status, answer.headers.get("Retry-After")

    async def use(client: TestClient[Any, Any]) -> list[tuple[int, str | None]]:
        first = asyncio.create_task(status(client))
        await asyncio.to_thread(begun.wait, 60)
        others = [asyncio.create_task(status(client)) for _ in range(6)]
        sent_away = [await each for each in asyncio.as_completed(others[2:])][:4]
        may_end.set()
        return [await first, *[await each for each in others[:2]], *sent_away]

    assert serve(handler, use, line=workers(waiting=2)) == [(200, None)] * 3 + [(503, "3")] * 4
    assert serve(handler, status, line=workers()) == (200, None)


def test_no_thread_starts_before_the_first_request() -> None:
    before = threading.active_count()
    line = workers()
    assert threading.active_count() == before
    assert asyncio.run(line.run(lambda: threading.current_thread().daemon)) is True
    assert threading.active_count() == before + 1


def test_what_a_route_takes_has_been_checked() -> None:
    async def use(client: TestClient[Any, Any]) -> Any:
        async with client.post("/jobs/cat/position", json={"position": 2.0}) as answer:
            return await answer.json()

    assert serve(dict, use, endpoint=MOVE) == {"id": "cat", "position": 2}
