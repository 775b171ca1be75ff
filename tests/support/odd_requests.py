"""Requests that nobody of good will sends: the table of routes times odd values."""

from __future__ import annotations

import gzip
import http.client
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from custom_diffusion.host.http.api import ENDPOINTS
from custom_diffusion.host.http.endpoint import JSON_TYPE, PREFIX, Endpoint

NAMES = (
    *(
        "none",
        "%00",
        "%0A",
        "%20",
        "%7Bid%7D",
        "%ED%A0%80",
        "%FF",
        "%E0%A4",
        "%",
        "%25",
        "%F0%9F%90%88",
    ),
    *("..", "%2E%2E", "..%2F..%2Fuser", "..%5C..%5Cuser", "%2Fetc%2Fpasswd", "C:%5CWindows", "CON"),
    *("a" * 300, "a" * 5000, "a%2F" * 1500, "%F0%9F%90%88" * 80, "cat.safetensors%00", "job.json"),
)
NUMBERS = (
    *(
        "-1",
        "1e9",
        "1E400",
        "1.0",
        "1.5",
        "0x2",
        "+2",
        "%202",
        "2%0A",
        "1_0",
        "true",
        "NaN",
        "Infinity",
    ),
    *("%EF%BC%99", "%D9%A3", "%C2%B2", "%00", "", "5" * 5000, "5" * 12, "1000000001", "null"),
    *("[]", "..%2Fjob.json", "%ED%A0%80"),
)
QUERIES = (
    *("nothing=1", "a=1&a=2", "%ED%A0%80=1", "%00", "&&&", "=", "after[]=1", "constructor=1"),
    *("sort=size", "sort=%00", "sort=__class__", "base=sd9", "order=", "base=sd15&base=sd2"),
    *("search=" + "a" * 5000, "search=%ED%A0%80", "search=%00", "search=(a%2B)%2B", "search=%FF"),
)
BODIES = (
    *(
        b"{",
        b"[]",
        b"[1]",
        b'"text"',
        b"7",
        b"true",
        b"NaN",
        b"\xff\xfe",
        b"\x00",
        b"\xef\xbb\xbf{}",
    ),
    *(b'{"position": NaN}', b'{"position": 1e400}', b'{"position": -1}', b'{"position": true}'),
    *(b'{"position": 1.5}', b'{"position": "0"}', b'{"position": null}', b'{"position": [0]}'),
    *(b'{"position": {}}', b'{"position": 0, "position": 1}', b'{"position": 0, "id": "x"}'),
    b'{"position": ' + b"9" * 5000 + b"}",
    *(b'{"\\ud800": 1}', b'{"\\u0000": 1}', b'{"id": "..", "step": 1}', b"[" * 60_000),
    *(
        b'{"a":' * 10_000,
        b'{"a": "' + b"x" * 70_000 + b'"}',
        b"{}" * 40_000,
        b"[]" + b" " * 200_000,
    ),
    "{}".encode("utf-16"),
)
TYPES = (
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
    "",
    "json",
    "a/b;=",
)
METHODS = ("PUT", "PATCH", "HEAD", "OPTIONS", "QUERY", "TRACE")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    endpoint: Endpoint
    body: bytes | None = None
    headers: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        body = "" if self.body is None else f" {self.body[:30]!r}"
        return f"{self.method} {self.path[:90]}{body} {dict(self.headers)}"


@dataclass(frozen=True)
class Answer:
    status: int
    type: str
    body: bytes
    headers: http.client.HTTPMessage


def odd_requests(job: str, concept: str) -> Iterator[Request]:
    """`job` and `concept` are there. None of these changes them."""
    typed = (("Content-Type", JSON_TYPE),)
    for endpoint in ENDPOINTS:
        right = PREFIX + endpoint.path.format(id=job, name=concept, step=2, picture=0)
        headers = typed if endpoint.method == "POST" else ()
        for path in _odd_paths(endpoint, job, concept):
            yield Request(endpoint.method, path, endpoint, None, headers)
        for query in (*QUERIES, *(f"after={number}" for number in NUMBERS)):
            if endpoint.method == "GET":
                yield Request("GET", f"{right}?{query}", endpoint)
            elif query in QUERIES[:3]:
                yield Request(endpoint.method, f"{right}?{query}", endpoint, None, headers)
        if endpoint.method != "GET" or not endpoint.parameters:
            for body in BODIES:
                yield Request(endpoint.method, right, endpoint, body, typed)
        if endpoint.method == "POST":
            for kind in TYPES:
                yield Request("POST", right, endpoint, b"{}", (("Content-Type", kind),))
            yield Request("POST", right, endpoint)
            for encoding in ("gzip", "deflate"):
                coded = (*typed, ("Content-Encoding", encoding))
                yield Request("POST", right, endpoint, b"no such thing", coded)
            bomb = gzip.compress(bytes(10_000_000))
            yield Request("POST", right, endpoint, bomb, (*typed, ("Content-Encoding", "gzip")))
        for method in METHODS:
            yield Request(method, right, endpoint)


def _odd_paths(endpoint: Endpoint, job: str, concept: str) -> Iterator[str]:
    if "{" not in endpoint.path:
        yield from (f"{PREFIX}{endpoint.path}/", f"{PREFIX}{endpoint.path}%00")
    if "{id}" in endpoint.path or "{name}" in endpoint.path:
        yield from (
            PREFIX + endpoint.path.format(id=odd, name=odd, step=2, picture=0) for odd in NAMES
        )
    if "{step}" in endpoint.path:
        yield from (
            PREFIX + endpoint.path.format(id=job, step=number, picture=number) for number in NUMBERS
        )


def send(url: str, request: Request, timeout_s: float = 30.0) -> Answer:
    """On a connection of its own."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout_s)
    try:
        own_host = any(name == "Host" for name, _ in request.headers)
        connection.putrequest(request.method, request.path, skip_host=own_host)
        for name, value in request.headers:
            connection.putheader(name, value)
        if request.body is not None:
            connection.putheader("Content-Length", str(len(request.body)))
        connection.endheaders()
        if request.body is not None:
            connection.send(request.body)
        answer = connection.getresponse()
        kind = answer.headers.get_content_type() if "Content-Type" in answer.headers else ""
        return Answer(answer.status, kind, answer.read(), answer.headers)
    finally:
        connection.close()
