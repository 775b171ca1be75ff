"""The routes over HTTP as one table. The server answers what stands here and `openapi.py` describes
it, so neither can say what the other does not know.

It knows neither ComfyUI nor aiohttp. What answers a route is in `host/comfyui/http/routes.py`.
"""

from __future__ import annotations

from ...concept.layers import FAMILIES
from ...inspection.library import ORDERS, SORTS
from ...trainer.jobs.records import MOST_CELLS
from .endpoint import PICTURE, Endpoint, Parameter

MOST_STEPS = 1_000_000_000
"""No training has more; a file of a sample has a name of so many digits."""

_JOB = Parameter("id", "path", "The job's id, which is its folder's name")
_CONCEPT = Parameter(
    "name", "path", "The file below ComfyUI's folders for concepts; a slash in it may be %2F"
)
_FOLDER = Parameter("folder", "query", "As Custom Diffusion Concept offers it")
_PICTURE = Parameter("name", "path", "One of the folder's `pictures`")
_CONCEPT_FAULT = "The file cannot be read as what it claims to be"
_NOT_NOW = "The job cannot do that in the state it is in; the answer says why"

ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("list_jobs", "GET", "/jobs", "All jobs, the oldest first", "Jobs"),
    Endpoint("show_job", "GET", "/jobs/{id}", "A job in full", "JobInFull", (_JOB,)),
    Endpoint(
        "delete_job",
        "DELETE",
        "/jobs/{id}",
        "Removes the job and its folder; the concept that it saved stays",
        "Deleted",
        (_JOB,),
        conflict="The job is at work, or some of it could not be removed; the answer says what",
    ),
    Endpoint(
        "show_losses",
        "GET",
        "/jobs/{id}/metrics",
        "The losses of the steps after some step",
        "Losses",
        (_JOB, Parameter("after", "query", "That step", default=0, most=MOST_STEPS)),
    ),
    Endpoint(
        "show_differences",
        "GET",
        "/jobs/{id}/differences",
        "The settings in which the job differs from another",
        "Differences",
        (_JOB, Parameter("other", "query", "The other job's id")),
    ),
    Endpoint(
        "show_graph",
        "GET",
        "/jobs/{id}/graph",
        "The graph that the job came from, as ComfyUI's /prompt takes it",
        "Graph",
        (_JOB,),
        conflict="The job did not come from a graph",
    ),
    Endpoint(
        "show_sample",
        "GET",
        "/jobs/{id}/samples/{step}",
        "A picture that was drawn at a step",
        PICTURE,
        (_JOB, Parameter("step", "path", "One of the job's `samples`", most=MOST_STEPS)),
        conflict="The file is no picture",
    ),
    Endpoint(
        "show_comparison",
        "GET",
        "/jobs/{id}/comparison",
        "The sheet of the job's steps that was drawn last, or is being drawn",
        "Comparison",
        (_JOB,),
    ),
    Endpoint(
        "show_compared",
        "GET",
        "/jobs/{id}/comparison/pictures/{picture}",
        "A picture of that sheet",
        PICTURE,
        (_JOB, Parameter("picture", "path", "One of its `pictures`", most=MOST_CELLS)),
        conflict="The file is no picture",
    ),
    Endpoint(
        "take_step",
        "POST",
        "/jobs/{id}/comparison/take",
        "Saves the concept of a picture's step as a new file, and the picture beside it",
        "Card",
        (
            _JOB,
            Parameter("picture", "body", "One of the sheet's `pictures`", most=MOST_CELLS),
            Parameter("name", "body", "Of the file; a number is added where it is taken"),
        ),
        conflict="The concept cannot be read, or the file cannot be written",
    ),
    Endpoint(
        "pause_job",
        "POST",
        "/jobs/{id}/pause",
        "Asks the job to write a checkpoint and leave the device after the step it is in",
        "Job",
        (_JOB,),
        conflict=_NOT_NOW,
    ),
    Endpoint(
        "resume_job",
        "POST",
        "/jobs/{id}/resume",
        "Lets a paused job continue, before those that wait",
        "Job",
        (_JOB,),
        conflict=_NOT_NOW,
    ),
    Endpoint(
        "stop_job",
        "POST",
        "/jobs/{id}/stop",
        "Asks the job to save what it has learnt and end",
        "Job",
        (_JOB,),
        conflict=_NOT_NOW,
    ),
    Endpoint(
        "release_prompt",
        "POST",
        "/jobs/{id}/release",
        "Lets the prompt go that waits for the job: its other nodes run, the queue moves on, and "
        "the job stays as it is",
        "Job",
        (_JOB,),
        conflict="No prompt waits for the job",
    ),
    Endpoint(
        "move_job",
        "POST",
        "/jobs/{id}/position",
        "Moves a job that waits for its turn",
        "Queue",
        (_JOB, Parameter("position", "body", "Its new place, 0 for the next one", most=1_000_000)),
        conflict="The job does not wait for its turn",
    ),
    Endpoint(
        "list_concepts",
        "GET",
        "/concepts",
        "The files in ComfyUI's folders for concepts",
        "Concepts",
        (
            Parameter("search", "query", "Words that the name or the prompts hold", default=""),
            Parameter(
                "base", "query", "Of this base model only", default="", choices=("", *FAMILIES)
            ),
            Parameter("sort", "query", "In this order", default="name", choices=SORTS),
            Parameter(
                "order",
                "query",
                "Without it the newest and the largest come first, the rest ascends",
                default="",
                choices=("", *ORDERS),
            ),
        ),
        lane="concepts",
    ),
    Endpoint(
        "show_thumbnail",
        "GET",
        "/concepts/{name}/thumbnail",
        "The picture beside the file",
        PICTURE,
        (_CONCEPT,),
        lane="concepts",
        conflict="The file is no picture",
    ),
    Endpoint(
        "rename_concept",
        "POST",
        "/concepts/{name}/rename",
        "Gives the file, and the picture beside it, another name in the same folder",
        "Card",
        (_CONCEPT, Parameter("to", "body", "The name, made harmless as when one is saved")),
        lane="concepts",
        conflict="That name is taken, or the file cannot be moved",
    ),
    Endpoint(
        "delete_concept",
        "DELETE",
        "/concepts/{name}",
        "Moves the file, and the picture beside it, into the folder `bin` beside it",
        "Binned",
        (_CONCEPT,),
        lane="concepts",
        conflict="The file cannot be moved",
    ),
    Endpoint(
        "inspect_concept",
        "GET",
        "/concepts/{name}/inspection",
        "What the concept is, layer by layer; reads the whole file",
        "Inspection",
        (_CONCEPT,),
        lane="inspections",
        conflict=_CONCEPT_FAULT,
    ),
    Endpoint(
        "list_pictures",
        "GET",
        "/pictures",
        "The pictures directly in a folder of ComfyUI's input",
        "Pictures",
        (_FOLDER,),
        lane="pictures",
        conflict="There is no such folder, or it cannot be read",
    ),
    Endpoint(
        "show_picture",
        "GET",
        "/pictures/{name}",
        "A small copy of a picture",
        PICTURE,
        (_PICTURE, _FOLDER),
        lane="pictures",
        conflict="The file is no picture",
    ),
    Endpoint(
        "delete_picture",
        "DELETE",
        "/pictures/{name}",
        "Moves the picture, with its caption and its mask, into a hidden folder beside it",
        "Binned",
        (_PICTURE, _FOLDER),
        lane="pictures",
        conflict="The file cannot be moved",
    ),
    Endpoint(
        "show_concept",
        "GET",
        "/concepts/{name}",
        "What the header of the file says",
        "Card",
        (_CONCEPT,),
        lane="concepts",
        conflict=_CONCEPT_FAULT,
    ),
)
"""In the order in which they are looked through: the last one takes any path below its own."""
