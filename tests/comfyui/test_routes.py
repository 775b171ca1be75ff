"""The routes against what people should not send and files that should not be there, in a real
ComfyUI; and whether one who asks for much keeps others waiting.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from custom_diffusion.cli.job_server import JobServer
from custom_diffusion.concept.delta import DenseDelta
from custom_diffusion.concept.file import write_concept
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.host.http.api import ENDPOINTS
from custom_diffusion.host.http.endpoint import JSON_TYPE, PICTURE, PICTURE_TYPES, PREFIX
from custom_diffusion.trainer.jobs.folder import JobFolder
from support import pack_content
from support.comfy_server import ComfyServer
from support.concepts import random_concept
from support.odd_requests import Answer, Request, odd_requests, send

JOBS, CONCEPTS = f"{PREFIX}/jobs", f"{PREFIX}/concepts"
LIST_JOBS = ENDPOINTS[0]
LONG_S = 120.0
STATUSES = {
    (method, endpoint.path): endpoint.statuses().keys() - {405}
    for endpoint in ENDPOINTS
    for method in (("GET", "HEAD") if endpoint.method == "GET" else (endpoint.method,))
}
SD15_LAYERS = [
    f"output_blocks.{block}.1.transformer_blocks.0.attn2.to_{matrix}"
    for block in range(3, 6)
    for matrix in "kv"
]


@dataclass(frozen=True)
class Bench:
    server: ComfyServer
    finished: str
    paused: str

    @property
    def jobs_folder(self) -> Path:
        return self.server.output / "custom_diffusion" / "jobs"

    @property
    def concepts_folder(self) -> Path:
        return self.server.models / "custom_diffusion"

    def ask(self, path: str, method: str = "GET", body: bytes | None = None, **more: str) -> Answer:
        headers = tuple((name.replace("_", "-"), value) for name, value in more.items())
        return send(self.server.url, Request(method, path, LIST_JOBS, body, headers), LONG_S)


@pytest.fixture(scope="module")
def bench(comfyui_path: Path, base: Path) -> Iterator[Bench]:
    ids = pack_content.write_jobs(base / "output" / "custom_diffusion" / "jobs")
    pack_content.write_concepts(base / "models" / "custom_diffusion")
    with ComfyServer(comfyui_path, base) as server:
        yield Bench(server, *ids)


def error(answer: Answer) -> str:
    assert answer.type == JSON_TYPE, answer
    told = json.loads(answer.body)
    assert told.keys() == {"error"} and isinstance(told["error"], str)
    return told["error"]  # type: ignore[no-any-return]


def refuse_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def test_odd_requests_are_answered_as_described(bench: Bench) -> None:
    before = len(bench.server.log())
    counted: Counter[int] = Counter()
    wrong: list[str] = []
    for request in odd_requests(bench.finished, "cat.safetensors"):
        answer = send(bench.server.url, request)
        counted[answer.status] += 1
        wrong += [f"{request}: {fault}" for fault in faults(request, answer)]
    assert not wrong, f"{len(wrong)} of {counted}:\n" + "\n".join(wrong[:40])
    assert counted.total() > 300 and {200, 400, 404, 405, 413, 415} <= counted.keys()
    # aiohttp itself tells of bodies that it cannot decompress, after they are answered.
    assert not re.search(r" failed\s+Traceback", bench.server.log()[before:])
    listed = bench.server.get(JOBS)["jobs"]
    assert [job["state"] for job in listed] == ["finished", "paused"]


def faults(request: Request, answer: Answer) -> Iterator[str]:
    """What is wrong with an answer."""
    if request.method == "OPTIONS":  # ComfyUI answers it before us
        return
    documented = STATUSES.get((request.method, request.endpoint.path), {405})
    no_path = answer.status == 404 and (b"no such path" in answer.body or request.method == "HEAD")
    if answer.status not in documented and not no_path:
        yield f"{answer.status} is not among {sorted(documented)}"
    if answer.headers["X-Content-Type-Options"] != "nosniff":
        yield "nosniff is missing"
    if "max-age" in (answer.headers["Cache-Control"] or ""):
        yield "browsers may keep it"
    if answer.status == 304 or request.method == "HEAD":
        return
    if answer.type in PICTURE_TYPES:
        if (answer.status, request.endpoint.answer) != (200, PICTURE):
            yield f"a picture, with {answer.status}"
        return
    if answer.type != JSON_TYPE:
        yield f"the type is {answer.type}: {answer.body[:60]!r}"
        return
    told = json.loads(answer.body, parse_constant=refuse_constant)
    if answer.status != 200 and (told.keys() != {"error"} or not told["error"]):
        yield f"no error is told: {told}"


@pytest.mark.parametrize(
    ("head", "body"),
    [
        ("Transfer-Encoding: chunked", b"zz\r\njunk\r\n0\r\n\r\n"),
        ("Transfer-Encoding: chunked", b"5\r\nabc"),
        ("Content-Length: 5\r\nContent-Length: 6", b"{}   "),
        ("Content-Length: -1", b""),
        ("Content-Length: 5\r\nTransfer-Encoding: chunked", b"0\r\n\r\n"),
        ("Content-Length: 2\r\nContent-Encoding: br", b"{}"),
    ],
)
def test_broken_http_is_refused(bench: Bench, head: str, body: bytes) -> None:
    """Most of it by aiohttp, before a route is looked for: then it is not JSON."""
    with socket.create_connection(("127.0.0.1", bench.server.port), timeout=30) as connection:
        path = f"{JOBS}/{bench.finished}/position"
        lines = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON_TYPE}\r\n{head}\r\n\r\n"
        connection.sendall(lines.encode() + body)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile("rb").read()
    assert answer == b"" or b" 400 " in answer.splitlines()[0], answer  # empty: it broke off first
    assert bench.ask(JOBS).status == 200


def test_samples_are_pictures_or_errors(bench: Bench) -> None:
    path = f"{JOBS}/{bench.finished}/samples"
    picture = bench.ask(f"{path}/{pack_content.SAMPLE_STEP}")
    assert picture.status == 200 and picture.type == "image/png"
    assert picture.headers["Cache-Control"] == "no-cache"
    again = bench.ask(f"{path}/{pack_content.SAMPLE_STEP}", If_None_Match=picture.headers["ETag"])
    assert again.status == 304 and again.body == b""
    for step, status, why in (
        (pack_content.DIRECTORY_STEP, 404, "drew no sample at step 4"),
        (pack_content.PIPE_STEP, 404, "drew no sample at step 6"),
        (pack_content.PAGE_STEP, 409, "000000008.png"),
    ):
        answer = bench.ask(f"{path}/{step}")
        assert answer.status == status and why in error(answer)


def test_a_thumbnail_is_of_the_kind_that_it_is(bench: Bench) -> None:
    jpeg = bench.ask(f"{CONCEPTS}/cat.safetensors/thumbnail")
    assert (jpeg.status, jpeg.type) == (200, "image/jpeg")
    page = bench.ask(f"{CONCEPTS}/below/page.safetensors/thumbnail")
    assert page.status == 409 and "no PNG, JPEG or WebP" in error(page)
    slash = bench.ask(f"{CONCEPTS}/below%2Fpage.safetensors")
    assert slash.status == 200 and json.loads(slash.body)["name"] == "below/page.safetensors"


def test_losses_end_before_a_line_that_is_none(bench: Bench) -> None:
    """NaN is no loss of ours: what follows it in a stranger's file is not told either."""
    answer = bench.ask(f"{JOBS}/{bench.finished}/metrics")
    assert json.loads(answer.body, parse_constant=refuse_constant)["losses"] == [0.5]


def test_names_that_cannot_be_written_do_not_break_the_list(bench: Bench) -> None:
    answer = bench.ask(CONCEPTS)
    listed = json.loads(answer.body.decode("utf-8"))
    assert f"{pack_content.LONG_NAME}.safetensors" in [card["name"] for card in listed["concepts"]]
    assert listed["unreadable"].keys() == {"\\udcff.safetensors", "damaged.safetensors"}


def test_wrong_methods_and_paths_are_answered_in_json(bench: Bench) -> None:
    answer = bench.ask(f"{JOBS}/{bench.finished}", "PUT")
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD, DELETE")
    assert "GET, HEAD, DELETE" in error(answer)
    for path in (PREFIX, f"{PREFIX}/", f"{PREFIX}/nothing", f"{JOBS}/", f"{JOBS}/a/b/c%0A"):
        answer = bench.ask(path)
        assert answer.status == 404 and "no such path" in error(answer), path
    assert bench.ask(f"/api{PREFIX}/nothing").status == 404
    assert bench.ask(JOBS, "HEAD").body == b""
    assert bench.ask(JOBS, "OPTIONS").status == 200


def test_a_form_on_another_site_changes_nothing(bench: Bench) -> None:
    """A browser sends these without asking first; `Origin: null` is that of a sandboxed frame. Past
    ComfyUI's own check where the server is asked by an address that is not the machine's own.
    """
    path = f"{JOBS}/{bench.paused}/stop"
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        for origin, host in (("null", "127.0.0.1"), ("http://evil.example", "192.0.2.7:8188")):
            answer = bench.ask(path, "POST", b"{}", Content_Type=kind, Origin=origin, Host=host)
            assert answer.status == 415 and JSON_TYPE in error(answer)
    assert bench.ask(path, "POST").status == 415
    assert bench.server.get(f"{JOBS}/{bench.paused}")["state"] == "paused"


def test_an_own_page_and_the_command_line_are_let_in(bench: Bench) -> None:
    own = {"Content_Type": JSON_TYPE, "Origin": bench.server.url}
    assert bench.ask(f"{JOBS}/{bench.finished}/stop", "POST", None, **own).status == 200
    assert bench.ask(f"{JOBS}/{bench.finished}/stop", "POST", b"null", **own).status == 200
    told = JobServer(bench.server.url).steer(bench.finished, "stop")
    assert told["state"] == "finished"


def test_a_job_is_deleted_once(bench: Bench) -> None:
    job = JobFolder.create(bench.jobs_folder, "goes", {"steps": 3})
    first = bench.ask(f"{JOBS}/{job.id}", "DELETE")
    assert (first.status, json.loads(first.body)) == (200, {"deleted": job.id})
    assert bench.ask(f"{JOBS}/{job.id}", "DELETE").status == 404


def test_inspections_keep_nobody_waiting(bench: Bench) -> None:
    """Twenty people inspect a concept for seconds, others list jobs and concepts."""
    deltas = {layer: DenseDelta(torch.randn(1280, 768)) for layer in SD15_LAYERS}
    large = replace(random_concept(family=FAMILIES["sd15"]), deltas=deltas)
    write_concept(large, bench.concepts_folder / "large.safetensors")
    path = f"{CONCEPTS}/large.safetensors/inspection"
    with ThreadPoolExecutor(20) as people:
        asked = [people.submit(bench.ask, path) for _ in range(20)]
        seconds = []
        while not all(each.done() for each in asked):
            for listed in (JOBS, CONCEPTS):
                start = time.monotonic()
                assert bench.ask(listed).status == 200
                seconds.append(time.monotonic() - start)
        answers = [each.result() for each in asked]
    refused = [answer for answer in answers if answer.status == 503]
    assert {answer.status for answer in answers} == {200, 503}
    assert len(refused) >= 10
    assert all(answer.headers["Retry-After"] == "10" and error(answer) for answer in refused)
    print(
        f"{len(seconds)} lists in {max(seconds):.3f} s at most, {median(seconds):.3f} s as a rule"
    )
    assert len(seconds) > 10 and median(seconds) < 0.3 and max(seconds) < 2
