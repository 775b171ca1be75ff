"""The one place where a request becomes the values that a route takes, and where what the route
returns or raises becomes an answer: JSON, or a picture of a kind that no browser runs.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import ClientError, web
from aiohttp.http_exceptions import HttpProcessingError

from ....concept.errors import (
    CustomDiffusionError,
    UnknownConceptError,
    UnknownJobError,
    UnknownPictureError,
)
from ....concept.regular_files import read_regular
from ...http.endpoint import (
    JSON_TYPE,
    MOST_BODY_BYTES,
    PICTURE,
    PICTURE_TYPES,
    Endpoint,
    UnusableRequestError,
)
from .workers import TooBusyError, Workers

log = logging.getLogger("custom_diffusion")

Values = Mapping[str, Any]
"""The parameters of a route, by name; as its description says"""
Handler = Callable[[Values], Any]
"""Returns what JSON can hold, or a picture: its path, or its bytes. Runs on a worker's thread."""
Responder = Callable[[web.Request], Awaitable[web.StreamResponse]]

_MOST_PICTURE_BYTES = 64 * 2**20
_PNG, _JPEG, _WEBP = PICTURE_TYPES


class GoneError(CustomDiffusionError):
    """A file was there a moment ago."""


class NoPictureError(CustomDiffusionError):
    """A file that should be a picture is something else."""


@dataclass(frozen=True)
class Answer:
    """What is sent back."""

    body: bytes
    status: int = 200
    type: str = JSON_TYPE
    headers: Mapping[str, str] = field(default_factory=dict)

    def response(self, request: web.Request) -> web.Response:
        headers = {
            "X-Content-Type-Options": "nosniff",
            # Else ComfyUI lets browsers keep what ends in .png, an error too.
            "Cache-Control": "no-store" if self.type == JSON_TYPE else "no-cache",
            **self.headers,
        }
        known = {tag.value for tag in request.if_none_match or ()}
        if "ETag" in headers and headers["ETag"].strip('"') in known:
            return web.Response(status=304, headers=headers)
        charset = "utf-8" if self.type == JSON_TYPE else None
        return web.Response(
            body=self.body,
            status=self.status,
            headers=headers,
            content_type=self.type,
            charset=charset,
        )


def answering(endpoint: Endpoint, handler: Handler, workers: Workers) -> Responder:
    """What aiohttp calls for a route."""

    async def respond(request: web.Request) -> web.StreamResponse:
        # As it was sent, without line breaks that would look like lines of the log
        what = f"{request.method} {request.rel_url.raw_path[:200]}"
        try:
            body = await _body(request)
            query = list(request.query.items())
            path = dict(request.match_info)

            def work() -> Answer:
                try:
                    sent = {"path": path, "query": _once(query), "body": _members(body)}
                    return _result(endpoint, handler(endpoint.values(sent)))
                except CustomDiffusionError as error:
                    return _refusal(what, error)
                except Exception as error:
                    log.exception("%s failed", what)
                    return _fault(error)

            answer = await workers.run(work)
        except CustomDiffusionError as error:
            answer = _refusal(what, error)
        except Exception as error:
            log.exception("%s failed", what)
            answer = _fault(error)
        return answer.response(request)

    return respond


def refusing(status: int, why: str, headers: Mapping[str, str] | None = None) -> Responder:
    """For what is no route of ours, below our prefix."""

    async def respond(request: web.Request) -> web.StreamResponse:
        return Answer(_json({"error": why}), status, headers=headers or {}).response(request)

    return respond


async def _body(request: web.Request) -> bytes:
    """Raises UnusableRequestError for one that is too long, broken, or not said to be JSON.

    A browser sends JSON to another site only where that site allows it, which ComfyUI does not; a
    form it would send, with whatever its fields hold. DELETE it would not send either.
    """
    if request.method == "POST" and request.content_type != JSON_TYPE:
        raise UnusableRequestError(
            f"the Content-Type is {request.content_type}; needed {JSON_TYPE}, also without a body",
            status=415,
        )
    body = bytearray()
    try:
        while chunk := await request.content.readany():
            body += chunk
            if len(body) > MOST_BODY_BYTES:
                raise UnusableRequestError(f"the body has over {MOST_BODY_BYTES} bytes", status=413)
    except (ClientError, HttpProcessingError, web.RequestPayloadError) as error:
        raise UnusableRequestError("the body cannot be decoded") from error
    return bytes(body)


def _members(body: bytes) -> Mapping[str, Any]:
    """Of the JSON object that the body is; none of an empty one, or of null."""
    try:
        content = json.loads(
            body.decode("utf-8") or "null", object_pairs_hook=_once, parse_constant=_no_number
        )
    except (ValueError, RecursionError) as error:
        raise UnusableRequestError(f"the body is no JSON in UTF-8: {str(error)[:80]}") from error
    if content is not None and not isinstance(content, dict):
        raise UnusableRequestError("the body is no JSON object")
    return content or {}


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Raises UnusableRequestError for a name that comes twice: which of the two would it be?"""
    pairs = list(pairs)
    members = dict(pairs)
    if len(members) < len(pairs):
        raise UnusableRequestError("a name is sent twice")
    return members


def _no_number(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _result(endpoint: Endpoint, result: Any) -> Answer:
    if isinstance(result, Path):
        return _picture(result)
    if endpoint.answer == PICTURE and isinstance(result, bytes):
        return _tagged(result, _WEBP)
    return Answer(_json(result))


def _json(result: Any) -> bytes:
    """With null for numbers that are not finite, and a question mark for letters that cannot be
    written in UTF-8: names of files may hold them.
    """
    plain = json.loads(json.dumps(result), parse_constant=lambda _: None)
    return json.dumps(plain, allow_nan=False, ensure_ascii=False).encode("utf-8", "replace")


def _picture(path: Path) -> Answer:
    """Of a kind that its content tells, not its name. Raises GoneError where it is not there any
    more, NoPictureError where it is none.
    """
    try:
        content = read_regular(path, _MOST_PICTURE_BYTES)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise GoneError(f"The picture {path.name} is not there any more.") from error
        content = b""
    kind = _picture_type(content)
    if kind is None:
        raise NoPictureError(
            f"{path.name} is no PNG, JPEG or WebP of at most {_MOST_PICTURE_BYTES // 2**20} MiB. "
            f"Put another picture in its place."
        )
    return _tagged(content, kind)


def _tagged(content: bytes, kind: str) -> Answer:
    tag = hashlib.sha256(content).hexdigest()[:32]
    return Answer(content, type=kind, headers={"ETag": f'"{tag}"'})


def _picture_type(content: bytes) -> str | None:
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return _PNG
    if content.startswith(b"\xff\xd8\xff"):
        return _JPEG
    return _WEBP if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


def _refusal(what: str, error: CustomDiffusionError) -> Answer:
    status, headers = 409, {}
    if isinstance(error, (UnknownJobError, UnknownConceptError, UnknownPictureError, GoneError)):
        status = 404
    elif isinstance(error, UnusableRequestError):
        status = error.status
    elif isinstance(error, TooBusyError):
        status, headers = 503, {"Retry-After": str(error.retry_after_s)}
    log.debug("%s: %d, %s", what, status, error)
    return Answer(_json({"error": str(error)}), status, headers=headers)


def _fault(error: Exception) -> Answer:
    """Without the error's own words, which may hold paths of this machine."""
    why = (
        f"The server failed at this ({type(error).__name__}). Its log says where; please report it."
    )
    return Answer(_json({"error": why}), 500)
