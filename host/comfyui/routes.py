"""Training jobs and concepts over HTTP, for the browser and for scripts: docs/http-api.md.

Jobs are found in the service's list, never by a path that somebody sends; concepts by ComfyUI's own
lookup of model files, which does not leave their folders.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web
from server import PromptServer

from ...concept.card import ConceptCard, read_card, thumbnail
from ...concept.errors import (
    CustomDiffusionError,
    JobError,
    UnknownConceptError,
    UnknownJobError,
)
from ...concept.inspection import inspect_concept
from ...concept.library import list_concepts
from ...formats.card import read_any_card
from ...formats.importing import open_concept
from ...trainer.jobs import Job
from .jobs import delete_job, device_memory, training_service
from .paths import concept_files, concept_path

PREFIX = "/custom_diffusion"
Values = Mapping[str, Any]
"""What was sent: parts of the path, of the query, of a JSON body"""
Handler = Callable[[Values], Any]


def _list(sent: Values) -> dict[str, Any]:
    service = training_service()
    return {"jobs": [job.snapshot().as_json() for job in service.jobs()], "queue": service.queued()}


def _show(sent: Values) -> dict[str, Any]:
    job = _job(sent)
    described = {
        k: v for k, v in job.folder.description.content.items() if k not in ("graph", "name")
    }
    return {
        **described,
        **job.snapshot().as_json(),
        "loaded": job.is_loaded,
        "log": job.snapshot().log,
        "memory": device_memory(),
        "samples": list(job.folder.samples()),
    }


def _metrics(sent: Values) -> dict[str, Any]:
    after = int(sent.get("after", 0))
    if after < 0:
        raise ValueError("after must be 0 or more")
    losses = _job(sent).losses(after)
    return {"after": after, "losses": [loss if math.isfinite(loss) else None for loss in losses]}


def _graph(sent: Values) -> dict[str, Any]:
    job = _job(sent)
    graph = job.folder.description.graph
    if not graph:
        raise JobError(f"The training job {job.id} has no graph to queue again.")
    return graph  # type: ignore[no-any-return]


def _sample(sent: Values) -> Path:
    job, step = _job(sent), int(sent["step"])
    samples = job.folder.samples()
    if step not in samples:
        raise UnknownJobError(f"The training job {job.id} drew no sample at step {step}.")
    return samples[step]


def _control(sent: Values, *, action: str) -> dict[str, Any]:
    service, job = training_service(), _job(sent)
    getattr(service, action)(job.id)
    return job.snapshot().as_json()


def _move(sent: Values) -> dict[str, Any]:
    training_service().reorder(_job(sent).id, int(sent["position"]))
    return {"queue": training_service().queued()}


def _delete(sent: Values) -> dict[str, Any]:
    job = _job(sent)
    delete_job(job.id)
    return {"deleted": job.id}


def _concepts(sent: Values) -> dict[str, Any]:
    asked = {key: sent[key] for key in ("search", "base", "sort", "order") if key in sent}
    return list_concepts(concept_files(), _card, **asked).as_json()


def _concept(sent: Values) -> dict[str, Any]:
    return {"name": sent["name"], **_card(sent["name"]).as_json()}


def _inspection(sent: Values) -> dict[str, Any]:
    name, path = sent["name"], concept_path(sent["name"])
    opened = open_concept(path)
    created = "" if opened.foreign else read_card(path).created
    return {"name": name, **inspect_concept(opened.concept, path, created=created).as_json()}


def _thumbnail(sent: Values) -> Path:
    picture = thumbnail(concept_path(sent["name"]))
    if picture is None:
        raise UnknownConceptError(f"There is no picture beside the concept {sent['name']}.")
    return picture


ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/jobs", _list),
    ("GET", "/jobs/{id}", _show),
    ("GET", "/jobs/{id}/metrics", _metrics),
    ("GET", "/jobs/{id}/graph", _graph),
    ("GET", "/jobs/{id}/samples/{step}", _sample),
    ("POST", "/jobs/{id}/pause", partial(_control, action="pause")),
    ("POST", "/jobs/{id}/resume", partial(_control, action="resume")),
    ("POST", "/jobs/{id}/stop", partial(_control, action="stop")),
    ("POST", "/jobs/{id}/position", _move),
    ("DELETE", "/jobs/{id}", _delete),
    ("GET", "/concepts", _concepts),
    ("GET", "/concepts/{name:.+}/thumbnail", _thumbnail),
    ("GET", "/concepts/{name:.+}/inspection", _inspection),
    ("GET", "/concepts/{name:.+}", _concept),
)


def add_routes() -> None:
    """Called once, while ComfyUI loads the pack."""
    server = getattr(PromptServer, "instance", None)
    for method, path, handler in ROUTES if server else ():
        server.routes.route(method, PREFIX + path)(_answering(handler))


def _answering(handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """The one place where what a handler returns or raises becomes an answer."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            body = (await request.json() or {}) if request.can_read_body else {}
            sent = {**request.query, **body, **request.match_info}
            result = await asyncio.to_thread(handler, sent)
        except (UnknownJobError, UnknownConceptError) as error:
            return web.json_response({"error": str(error)}, status=404)
        except CustomDiffusionError as error:
            return web.json_response({"error": str(error)}, status=409)
        except (ValueError, TypeError, LookupError) as error:
            text = f"What was sent cannot be used ({type(error).__name__}: {error})."
            return web.json_response({"error": text}, status=400)
        return web.FileResponse(result) if isinstance(result, Path) else web.json_response(result)

    return answer


def _card(name: str) -> ConceptCard:
    return read_any_card(concept_path(name))


def _job(sent: Values) -> Job:
    return training_service().job(sent["id"])
