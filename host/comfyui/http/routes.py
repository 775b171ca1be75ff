"""Training jobs and concepts over HTTP, for the browser and for scripts: docs/http-api.md.

Jobs are found in the service's list, never by a path that somebody sends; concepts by ComfyUI's own
lookup of model files, which does not leave their folders. What may be sent and what is answered
stands in `host/http/api.py`, and has been checked when a function here is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from server import PromptServer

from ....concept.errors import ConceptFileError, JobError, UnknownConceptError, UnknownJobError
from ....formats.importing import open_concept
from ....inspection.any_card import read_any_card
from ....inspection.card import ConceptCard, read_card, thumbnail
from ....inspection.filing import bin_concept, rename_concept
from ....inspection.library import list_concepts
from ....inspection.report import inspect_concept
from ....trainer.jobs.comparison import Comparison
from ....trainer.jobs.differences import differences
from ....trainer.jobs.job import Job
from ...http.api import ENDPOINTS
from ...http.endpoint import PREFIX, Endpoint, Lane
from ..jobs.service import delete_job, device_memory, training_service
from ..paths import concept_files, concept_folder, concept_path, listed_concept_path
from ..pictures import bin_picture, picture_names, picture_thumbnail
from .answers import Handler, Values, answering, refusing
from .workers import Workers


def _list(sent: Values) -> dict[str, Any]:
    service = training_service()
    return {"jobs": [job.snapshot().as_json() for job in service.jobs()], "queue": service.queued()}


def _show(sent: Values) -> dict[str, Any]:
    job = _job(sent)
    compared = Comparison.newest(job.folder)
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
        "compared": len(compared.pictures()) if compared else 0,
    }


def _metrics(sent: Values) -> dict[str, Any]:
    job, after = _job(sent), sent["after"]
    return {"after": after, "losses": job.losses(after), "validation": job.validation(after)}


def _differences(sent: Values) -> dict[str, Any]:
    one, other = (training_service().job(sent[name]).folder for name in ("id", "other"))
    return {"settings": differences(one.description, other.description)}


def _graph(sent: Values) -> Mapping[str, Any]:
    job = _job(sent)
    graph = job.folder.description.graph
    if not graph:
        raise JobError(f"The training job {job.id} has no graph to queue again.")
    return graph


def _sample(sent: Values) -> Path:
    job, step = _job(sent), sent["step"]
    samples = job.folder.samples()
    if step not in samples:
        raise UnknownJobError(f"The training job {job.id} drew no sample at step {step}.")
    return samples[step]


def _comparison(sent: Values) -> dict[str, Any]:
    found = _newest_comparison(_job(sent))
    return {**found.plan.as_json(), "pictures": list(found.pictures())}


def _compared(sent: Values) -> Path:
    job, number = _job(sent), sent["picture"]
    pictures = _newest_comparison(job).pictures()
    if number not in pictures:
        raise UnknownJobError(f"The comparison of {job.id} has drawn no picture {number} yet.")
    return pictures[number]


def _take_step(sent: Values) -> dict[str, Any]:
    found = _newest_comparison(_job(sent))
    file = found.take(sent["picture"], concept_folder(), sent["name"]).name
    return {"name": file, **_card(file).as_json()}


def _newest_comparison(job: Job) -> Comparison:
    found = Comparison.newest(job.folder)
    if found is None:
        raise UnknownJobError(f"The steps of the training job {job.id} have not been compared yet.")
    return found


def _control(sent: Values, *, action: str) -> dict[str, Any]:
    service, job = training_service(), _job(sent)
    getattr(service, action)(job.id)
    return job.snapshot().as_json()


def _move(sent: Values) -> dict[str, Any]:
    training_service().reorder(_job(sent).id, sent["position"])
    return {"queue": training_service().queued()}


def _delete(sent: Values) -> dict[str, Any]:
    job = _job(sent)
    delete_job(job.id)
    return {"deleted": job.id}


def _concepts(sent: Values) -> dict[str, Any]:
    return list_concepts(concept_files(), _card, **sent).as_json()


def _concept(sent: Values) -> dict[str, Any]:
    return {"name": sent["name"], **_card(sent["name"]).as_json()}


def _rename(sent: Values) -> dict[str, Any]:
    name, path = sent["name"], listed_concept_path(sent["name"])
    renamed = str(PurePath(name).with_name(rename_concept(path, sent["to"]).name))
    return {"name": renamed, **_card(renamed).as_json()}


def _delete_concept(sent: Values) -> dict[str, Any]:
    name, path = sent["name"], listed_concept_path(sent["name"])
    binned = bin_concept(path).relative_to(path.parent)
    return {"deleted": name, "bin": str(PurePath(name).parent / binned)}


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


def _pictures(sent: Values) -> dict[str, Any]:
    return {"folder": sent["folder"], "pictures": picture_names(sent["folder"])}


def _picture(sent: Values) -> bytes:
    return picture_thumbnail(sent["folder"], sent["name"])


def _delete_picture(sent: Values) -> dict[str, Any]:
    binned = bin_picture(sent["folder"], sent["name"])
    return {"deleted": sent["name"], "bin": f"{binned.parent.name}/{binned.name}"}


HANDLERS: Mapping[str, Handler] = {
    "list_jobs": _list,
    "show_job": _show,
    "delete_job": _delete,
    "show_losses": _metrics,
    "show_differences": _differences,
    "show_graph": _graph,
    "show_sample": _sample,
    "show_comparison": _comparison,
    "show_compared": _compared,
    "take_step": _take_step,
    "pause_job": partial(_control, action="pause"),
    "resume_job": partial(_control, action="resume"),
    "stop_job": partial(_control, action="stop"),
    "release_prompt": partial(_control, action="release"),
    "move_job": _move,
    "list_concepts": _concepts,
    "show_thumbnail": _thumbnail,
    "rename_concept": _rename,
    "delete_concept": _delete_concept,
    "inspect_concept": _inspection,
    "show_concept": _concept,
    "list_pictures": _pictures,
    "show_picture": _picture,
    "delete_picture": _delete_picture,
}


def add_routes() -> None:
    """Called once, while ComfyUI loads the pack."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    workers: Mapping[Lane, Workers] = {
        "jobs": Workers("jobs", threads=2, waiting=64, retry_after_s=1),
        "concepts": Workers("concepts", threads=2, waiting=64, retry_after_s=2),
        "inspections": Workers("inspections", threads=1, waiting=4, retry_after_s=10),
        "pictures": Workers("pictures", threads=1, waiting=256, retry_after_s=5),
    }
    methods: dict[str, list[str]] = {}
    for endpoint in ENDPOINTS:
        answer = answering(endpoint, HANDLERS[endpoint.operation], workers[endpoint.lane])
        server.routes.route(endpoint.method, PREFIX + _pattern(endpoint))(answer)
        allowed = methods.setdefault(_pattern(endpoint), [])
        allowed += ["GET", "HEAD"] if endpoint.method == "GET" else [endpoint.method]
    # After all that are right, because aiohttp takes the first that fits.
    for pattern, allowed in methods.items():
        needed = ", ".join(allowed)
        wrong = refusing(405, f"This path takes {needed} only.", {"Allow": needed})
        server.routes.route("*", PREFIX + pattern)(wrong)
    nothing = refusing(404, "This pack has no such path. docs/http-api.md lists those it has.")
    server.routes.route("*", PREFIX + r"{rest:(/[\s\S]*)?}")(nothing)


def _pattern(endpoint: Endpoint) -> str:
    """As aiohttp writes it. Names of concepts may hold slashes, and any name a line break."""
    return endpoint.path.replace("{name}", r"{name:[\s\S]+}").replace("{id}", "{id:[^/]+}")


def _card(name: str) -> ConceptCard:
    try:
        return read_any_card(concept_path(name))
    except OSError as error:  # it may go while the others are read
        raise ConceptFileError(
            f"{name} cannot be read ({error.strerror}). Refresh the list, and look at the "
            f"permissions of the file."
        ) from error


def _job(sent: Values) -> Job:
    return training_service().job(sent["id"])
