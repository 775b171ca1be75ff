"""The training jobs of a ComfyUI that runs, over its HTTP API (docs/http-api.md).

What answers at an address may be anything: an answer is read up to a size, and checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import ProxyHandler, Request, build_opener

from ..concept.errors import JobError
from ..concept.plain import read_json
from ..trainer.jobs.differences import Difference

_JOBS = "/custom_diffusion/jobs"
_TIMEOUT_S = 30.0
_MOST_BYTES = 256 << 20
"""Of an answer: a job in full holds its graph, and a graph may hold pictures"""
_SHOWN = {"id": str, "state": str, "error": str, "step": int, "steps": int}
"""What commands read of a job"""
_OPENER = build_opener(ProxyHandler({}))
"""Without a proxy: a ComfyUI is on this machine or near it."""
_Answer = TypeVar("_Answer")


class JobServer:
    """Every method raises JobError with the server's reason when it refuses or does not answer."""

    def __init__(self, address: str) -> None:
        """`address` such as http://127.0.0.1:8188"""
        if not address.startswith(("http://", "https://")):  # urllib opens files too
            raise JobError(
                f"{address} is no address of a ComfyUI. Give one such as http://127.0.0.1:8188."
            )
        self._address = address.rstrip("/")

    def all(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Every job, and the ids of those that wait for their turn, the next one first."""
        return self._ask(
            "GET", _JOBS, lambda answer: ([_job(each) for each in answer["jobs"]], _queue(answer))
        )

    def show(self, job_id: str) -> dict[str, Any]:
        return self._ask("GET", _path(job_id), _job)

    def losses(self, job_id: str) -> list[float | None]:
        """None where a loss was not finite"""
        return self._ask("GET", f"{_path(job_id)}/metrics", _losses)

    def differences(self, job_id: str, other_id: str) -> dict[str, Difference]:
        path = f"{_path(job_id)}/differences?other={_quoted(other_id)}"
        return self._ask("GET", path, _differences)

    def steer(self, job_id: str, action: str) -> dict[str, Any]:
        """Pause, resume or stop; returns the job."""
        return self._ask("POST", f"{_path(job_id)}/{action}", _job)

    def move(self, job_id: str, position: int) -> list[str]:
        """Returns the ids of those that wait."""
        return self._ask("POST", f"{_path(job_id)}/position", _queue, {"position": position})

    def start(self, job_id: str) -> None:
        """Queues the graph that the job came from."""
        graph = self._ask("GET", f"{_path(job_id)}/graph", dict)
        self._ask("POST", "/prompt", dict, {"prompt": graph})

    def delete(self, job_id: str) -> None:
        self._ask("DELETE", _path(job_id), dict)

    def _ask(
        self, method: str, path: str, check: Callable[[Any], _Answer], body: object = None
    ) -> _Answer:
        """What `check` makes of the answer; it raises TypeError, LookupError or ValueError for one
        that is not of this pack.
        """
        data = None if body is None else json.dumps(body).encode()
        try:
            request = Request(f"{self._address}{path}", data, method=method)
            request.add_header("Content-Type", "application/json")
            with _OPENER.open(request, timeout=_TIMEOUT_S) as answer:
                return check(_content(answer))
        except HTTPError as error:
            raise JobError(self._refusal(error)) from error
        except (OSError, HTTPException, ValueError, TypeError, LookupError) as error:
            raise JobError(
                f"No ComfyUI with this pack answers at {self._address} "
                f"({str(error) or type(error).__name__}). Start it, or give the folder of its jobs."
            ) from error

    def _refusal(self, error: HTTPError) -> str:
        try:
            reason = _content(error)["error"]
            # ComfyUI's own errors are objects
            return str(reason["message"] if isinstance(reason, dict) else reason)
        except (OSError, HTTPException, ValueError, TypeError, LookupError):
            return (
                f"{self._address} answers with the status {error.code}, which is not of this "
                f"pack. Is it a ComfyUI, with the pack installed?"
            )


def _content(answer: Any) -> Any:
    """Of the body of an answer, which is JSON."""
    content = answer.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"the answer has more than {_MOST_BYTES >> 20} MiB")
    return read_json(content.decode())


def _job(answer: Any) -> dict[str, Any]:
    for name, kind in _SHOWN.items():
        if not isinstance(answer[name], kind):
            raise ValueError(f"the {name} of a job is {type(answer[name]).__name__}")
    return answer  # type: ignore[no-any-return]


def _queue(answer: Any) -> list[str]:
    return [str(job_id) for job_id in answer["queue"]]


def _losses(answer: Any) -> list[float | None]:
    return [None if loss is None else float(loss) for loss in answer["losses"]]


def _differences(answer: Any) -> dict[str, Difference]:
    return {str(name): _difference(*values) for name, values in dict(answer["settings"]).items()}


def _difference(one: str | None, other: str | None) -> Difference:
    return None if one is None else str(one), None if other is None else str(other)


def _path(job_id: str) -> str:
    return f"{_JOBS}/{_quoted(job_id)}"


def _quoted(job_id: str) -> str:
    return quote(job_id, safe="", errors="surrogatepass")
