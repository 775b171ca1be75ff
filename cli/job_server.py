"""The training jobs of a ComfyUI that runs, over its HTTP API (docs/http-api.md)."""

from __future__ import annotations

import json
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import ProxyHandler, Request, build_opener

from ..concept.errors import JobError

_JOBS = "/custom_diffusion/jobs"
_TIMEOUT_S = 30.0
_OPENER = build_opener(ProxyHandler({}))
"""Without a proxy: a ComfyUI is on this machine or near it."""


class JobServer:
    """Every method raises JobError with the server's reason when it refuses or does not answer."""

    def __init__(self, address: str) -> None:
        """`address` such as http://127.0.0.1:8188"""
        self._address = address.rstrip("/")

    def all(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Every job, and the ids of those that wait for their turn, the next one first."""
        answer = self._ask("GET", _JOBS)
        return answer["jobs"], answer["queue"]

    def show(self, job_id: str) -> Any:
        return self._ask("GET", _job(job_id))

    def losses(self, job_id: str) -> list[float | None]:
        """None where a loss was not finite"""
        return self._ask("GET", f"{_job(job_id)}/metrics")["losses"]  # type: ignore[no-any-return]

    def steer(self, job_id: str, action: str) -> Any:
        """Pause, resume or stop; returns the job."""
        return self._ask("POST", f"{_job(job_id)}/{action}")

    def move(self, job_id: str, position: int) -> Any:
        """Returns the ids of those that wait."""
        return self._ask("POST", f"{_job(job_id)}/position", {"position": position})["queue"]

    def start(self, job_id: str) -> None:
        """Queues the graph that the job came from."""
        self._ask("POST", "/prompt", {"prompt": self._ask("GET", f"{_job(job_id)}/graph")})

    def delete(self, job_id: str) -> None:
        self._ask("DELETE", _job(job_id))

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            request = Request(f"{self._address}{path}", data, method=method)
            request.add_header("Content-Type", "application/json")
            with _OPENER.open(request, timeout=_TIMEOUT_S) as answer:
                return json.load(answer)
        except HTTPError as error:
            raise JobError(self._refusal(error)) from error
        except (OSError, ValueError) as error:
            raise JobError(
                f"No ComfyUI with this pack answers at {self._address} ({error}). Start it, or "
                f"give the folder of its jobs."
            ) from error

    def _refusal(self, error: HTTPError) -> str:
        try:
            reason = json.load(error)["error"]
        except (OSError, ValueError, LookupError, TypeError):
            return (
                f"{self._address} answers with the status {error.code}, which is not of this "
                f"pack. Is it a ComfyUI, with the pack installed?"
            )
        # ComfyUI's own errors are objects
        return str(reason["message"] if isinstance(reason, dict) else reason)


def _job(job_id: str) -> str:
    return f"{_JOBS}/{quote(job_id, safe='')}"
