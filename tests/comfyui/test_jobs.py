"""Training jobs in a real ComfyUI: beside prompts, over HTTP, through interrupts and restarts."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from custom_diffusion.cli import main
from custom_diffusion.concept.file import read_concept
from support.comfy_server import ComfyPromptError, ComfyServer, ComfyServerError
from support.graphs import draw, draw_pictures, node, teach
from support.websocket import watch

JOBS = "/custom_diffusion/jobs"
LONG_S = 120.0
RESTARTED_STEPS = 8
ENDED = ("finished", "stopped", "failed")
TOO_MUCH = """
import torch
class TooMuch:
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "test"
    def run(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB")
class KeepLoaded:
    kept = []
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "clip": ("CLIP",)}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "test"
    def run(self, model, clip):
        self.kept[:] = [model, clip]
        return ()
NODE_CLASS_MAPPINGS = {"TooMuch": TooMuch, "KeepLoaded": KeepLoaded}
"""
"""A node that wants more memory than there is: ComfyUI unloads all models then. And one that keeps
its models loaded, as ComfyUI's own cache of results does where it is not off.
"""


@pytest.fixture(scope="module")
def server_of_this_file(comfyui_path: Path, checkpoints: Path, base: Path) -> Iterator[ComfyServer]:
    draw_pictures(base / "input" / "cat")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "too_much.py").write_text(TOO_MUCH)
    checkpoint = checkpoints / "sd15.safetensors"
    with ComfyServer(
        comfyui_path, base, checkpoints=[checkpoint], arguments=["--cache-none"], preloaded=False
    ) as running:
        yield running


@pytest.fixture
def bench(server_of_this_file: ComfyServer) -> ComfyServer:
    """The server without jobs and concepts of the test before."""
    server = server_of_this_file
    server.post("/interrupt", {})
    until(lambda: server.get("/queue")["queue_running"] == [], "a quiet queue")
    for left in jobs(server):
        server.post(f"{JOBS}/{left['id']}/stop")
        until(lambda left=left: shown(server, left)["state"] in ENDED, "the end")  # type: ignore[misc]
        server.delete(f"{JOBS}/{left['id']}")
    for file in (server.models / "custom_diffusion").glob("*"):
        file.unlink()
    return server


def train(name: str = "cat", steps: int = 10_000, **settings: Any) -> dict[str, Any]:
    settings = {"wait": False, "checkpoint_every_steps": 2, **settings}
    return teach(name, "cat", "cat", "<new1>", steps=steps, **settings)


def kept_loaded(graph: dict[str, Any]) -> dict[str, Any]:
    return {**graph, "keep": node("KeepLoaded", model=["checkpoint", 0], clip=["checkpoint", 1])}


def jobs(server: ComfyServer) -> list[dict[str, Any]]:
    return server.get(JOBS)["jobs"]  # type: ignore[no-any-return]


def shown(server: ComfyServer, one: dict[str, Any]) -> dict[str, Any]:
    return server.get(f"{JOBS}/{one['id']}")  # type: ignore[no-any-return]


def job(server: ComfyServer) -> dict[str, Any]:
    (only,) = jobs(server)
    return only


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.05)


def until_state(server: ComfyServer, state: str) -> dict[str, Any]:
    until(lambda: job(server)["state"] == state, state)
    return job(server)


def until_step(server: ComfyServer, step: int) -> dict[str, Any]:
    until(lambda: job(server)["step"] >= step, f"step {step}")
    return job(server)


def tensors(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def concept(server: ComfyServer, name: str) -> Path:
    return server.models / "custom_diffusion" / f"{name}.safetensors"


def refused(server: ComfyServer, call: Callable[[], Any]) -> tuple[int | None, str]:
    with pytest.raises(ComfyServerError) as caught:
        call()
    return caught.value.status, caught.value.body["error"]


def test_a_job_is_watched_paused_resumed_and_stopped_over_http(bench: ComfyServer) -> None:
    bench.run(kept_loaded(train(preview_every_steps=4)))
    first = until_step(bench, 5)
    path = f"{JOBS}/{first['id']}"
    told = shown(bench, first)
    assert told["config"]["steps"] == told["steps"] == 10_000
    assert told["samples"][:1] == [4]
    assert bench.get_bytes(f"{path}/samples/4").startswith(b"\x89PNG")
    losses = bench.get(f"{path}/metrics")["losses"]
    assert bench.get(f"{path}/metrics?after=3")["losses"][: len(losses) - 3] == losses[3:]
    bench.post(f"{path}/pause")
    paused = until_state(bench, "paused")
    assert shown(bench, paused)["loaded"]
    assert job(bench) == paused
    bench.post(f"{path}/resume")
    assert until_step(bench, paused["step"] + 2)["state"] == "running"
    bench.post(f"{path}/stop")
    stopped = until_state(bench, "stopped")
    taught = read_concept(concept(bench, "cat"))
    assert stopped["concept_file"] == "cat.safetensors"
    assert taught.provenance["steps"] == stopped["step"]


def test_a_job_whose_model_is_gone_says_so_and_waits_for_its_graph(bench: ComfyServer) -> None:
    """Once while it is paused, and once while it is queued behind one of another model."""
    bench.run(train(steps=8))
    first = until_step(bench, 2)
    path = f"{JOBS}/{first['id']}"
    bench.post(f"{path}/pause")
    until_state(bench, "paused")
    until(lambda: not shown(bench, first)["loaded"], "the model is gone")
    status, error = refused(bench, lambda: bench.post(f"{path}/resume"))
    assert status == 409 and "Queue the graph again that it came from" in error
    bench.run(train("other", steps=10_000, seed=1))
    until(lambda: jobs(bench)[-1]["step"] >= 2, "the other's steps")
    graph = bench.get(f"{path}/graph")
    graph["skip"] = node("CLIPSetLastLayer", clip=["checkpoint", 1], stop_at_clip_layer=-2)
    graph["cat"]["inputs"] |= {"clip": ["skip", 0], "name": "of another"}
    bench.run(graph)
    behind = jobs(bench)[-1]
    assert behind["state"] == "queued"
    bench.post(f"{JOBS}/{jobs(bench)[1]['id']}/stop")
    until(lambda: jobs(bench)[-1]["state"] == "paused", "its turn")
    (note,) = jobs(bench)[-1]["notes"]
    assert "not loaded any more" in note and "Queue its graph again" in note
    bench.run(bench.get(f"{path}/graph"))
    until(lambda: jobs(bench)[0]["state"] == "finished", "the end")
    assert read_concept(concept(bench, "cat")).provenance["steps"] == 8


def test_what_cannot_be_done_is_answered_and_why(bench: ComfyServer) -> None:
    bench.run(train(steps=2))
    ended = until_state(bench, "finished")
    path = f"{JOBS}/{ended['id']}"
    for sent, status, told in (
        (lambda: bench.get(f"{JOBS}/none"), 404, "There is no training job 'none'"),
        (lambda: bench.get(f"{JOBS}/..%2F..%2Fuser"), 404, "There is no training job"),
        (lambda: bench.get(f"{path}/samples/1"), 404, "drew no sample at step 1"),
        (lambda: bench.get(f"{path}/samples/..%2Fjob.json"), 400, "cannot be used"),
        (lambda: bench.get(f"{path}/metrics?after=x"), 400, "cannot be used"),
        (lambda: bench.get(f"{path}/metrics?after=-1"), 400, "0 or more"),
        (lambda: bench.post(f"{path}/pause"), 409, "is finished"),
        (lambda: bench.post(f"{path}/position", {"position": 0}), 409, "does not wait"),
        (lambda: bench.post(f"{path}/position", {}), 400, "position"),
        (lambda: bench.post(f"{path}/resume"), 409, "is finished"),
    ):
        code, error = refused(bench, sent)
        assert (code, told in error) == (status, True), error
    bench.delete(path)
    assert jobs(bench) == []
    assert concept(bench, "cat").is_file()


def test_the_same_graph_is_not_learnt_twice(bench: ComfyServer) -> None:
    graph = train(steps=3, wait=True)
    bench.run(graph)
    written = concept(bench, "cat").stat().st_mtime_ns
    started = time.monotonic()
    entry = bench.run(graph)
    assert time.monotonic() - started < 60
    assert len(jobs(bench)) == 1
    assert concept(bench, "cat").stat().st_mtime_ns == written
    assert "it is not begun again" in bench.log()
    assert entry["status"]["completed"]
    bench.run(train(steps=4, wait=True))
    assert len(jobs(bench)) == 2


def test_pictures_come_out_the_same_while_a_job_runs(bench: ComfyServer) -> None:
    """Bit by bit; and the job makes no step while ComfyUI draws, unless it shares the device."""
    drawn = draw("photo of a cat")
    drawn["sampler"]["inputs"]["steps"] = 12
    alone = bench.images(bench.run(drawn), "image")[0]
    for share in (False, True):
        bench.run(train(f"cat-{share}", share_device=share))
        until(lambda: jobs(bench)[-1]["step"] >= 3, "a step")
        running = jobs(bench)[-1]
        prompt = bench.queue(drawn)
        until(lambda: bench.get("/queue")["queue_running"] != [], "the prompt")
        during: list[int] = []
        while True:
            step = bench.get(f"{JOBS}/{running['id']}")["step"]
            if not bench.get("/queue")["queue_running"]:
                break
            during.append(step)
        picture = bench.images(bench.wait(prompt), "image")[0]
        assert np.array_equal(picture, alone)
        if share:
            assert during[-1] > during[0] + 1
        else:
            assert during[-1] <= during[0] + 1  # the step that it was in
        reached = during[-1]
        until(lambda reached=reached: jobs(bench)[-1]["step"] > reached, "going on")  # type: ignore[misc]
        bench.post(f"{JOBS}/{running['id']}/stop")
        until(lambda: jobs(bench)[-1]["state"] == "stopped", "the end")


def test_interrupting_can_leave_the_job_to_the_background(bench: ComfyServer) -> None:
    prompt = bench.queue(train(wait=True, keep_on_interrupt=True))
    until(lambda: jobs(bench) != [], "the job")
    step = until_step(bench, 2)["step"]
    bench.interrupt(prompt)
    with pytest.raises(ComfyPromptError):
        bench.wait(prompt)
    assert until_step(bench, step + 3)["state"] == "running"


def test_what_befalls_other_prompts_does_not_touch_a_job(
    bench: ComfyServer,
) -> None:
    bench.run(train(share_device=True))
    slow = draw("photo of a cat")
    slow["sampler"]["inputs"]["steps"] = 500
    prompt = bench.queue(slow)
    until(lambda: re.search(r" [1-9]\d*/500 \[", bench.log()) is not None, "a step of sampling")
    bench.interrupt(prompt)
    with pytest.raises(ComfyPromptError):
        bench.wait(prompt)
    bench.interrupt()  # with nothing to interrupt
    with pytest.raises(ComfyPromptError, match="out of memory"):
        bench.run({"node": node("TooMuch")})
    bench.post("/free", {"unload_models": True, "free_memory": True})
    step = job(bench)["step"]
    assert until_step(bench, step + 4)["state"] == "running"


@cache
def undisturbed(server: ComfyServer, augment: bool) -> bytes:
    """What a training learns that nobody disturbs. No other job may be at work."""
    server.run(train("whole", steps=RESTARTED_STEPS, wait=True, augment=augment))
    server.delete(f"{JOBS}/{job(server)['id']}")
    return tensors(concept(server, "whole"))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_after_a_restart_the_graph_goes_on_and_learns_the_same(
    bench: ComfyServer, end: signal.Signals
) -> None:
    # Once: every view takes half a second to encode, and a preview is twenty steps of sampling.
    augment = end == signal.SIGKILL
    whole = undisturbed(bench, augment)
    every = 3 if augment else 0
    bench.run(train("ended", steps=RESTARTED_STEPS, preview_every_steps=every, augment=augment))
    until(lambda: job(bench)["step"] >= 3, "step 3")
    assert bench.process is not None
    os.kill(bench.process.pid, end)
    bench.process.wait(LONG_S)
    bench.process = None
    bench.start()
    left = job(bench)
    assert left["state"] == "paused" and left["step"] >= 2
    if end == signal.SIGINT:  # Ctrl-C: there was time for a last checkpoint
        assert left["step"] == len(bench.get(f"{JOBS}/{left['id']}/metrics")["losses"])
    status, error = refused(bench, lambda: bench.post(f"{JOBS}/{left['id']}/resume"))
    assert status == 409 and "Queue the graph again that it came from" in error
    graph = bench.get(f"{JOBS}/{left['id']}/graph")
    assert graph.keys() == {"checkpoint", "ended-data", "ended"}
    assert all(made.keys() == {"class_type", "inputs"} for made in graph.values())
    bench.run(graph)
    assert until_state(bench, "finished")["id"] == left["id"]
    assert tensors(concept(bench, "ended")) == whole


def test_a_graph_uses_what_a_running_job_has_learnt(bench: ComfyServer) -> None:
    looking = {
        "job": node("TrainingJob", job_id="", checkpoint="newest"),
        "saved": node("SaveConcept", concept=["job", 0], name="until now", precision="half (fp16)"),
        "samples": node("SaveImage", images=["job", 2], filename_prefix="samples"),
    }
    with pytest.raises(ComfyPromptError, match="There is no training job yet"):
        bench.run(looking)
    bench.run(train(preview_every_steps=2))
    until_step(bench, 5)
    entry = bench.run(looking)
    assert read_concept(concept(bench, "until-now")).provenance["steps"] >= 4
    assert len(bench.images(entry, "samples")) >= 2
    assert entry["outputs"]["job"]["text"][0].startswith("running, step ")
    looking["job"]["inputs"]["job_id"] = "none"
    with pytest.raises(ComfyPromptError, match="There is no training job 'none'"):
        bench.run(looking)


def test_the_browser_hears_of_a_job(bench: ComfyServer) -> None:
    graph = train(steps=4, wait=True)
    messages = watch(
        bench, lambda client: bench.post("/prompt", {"prompt": graph, "client_id": client})
    )
    told = [
        message["data"]
        for message in messages
        if isinstance(message, dict) and message["type"] == "custom_diffusion.job"
    ]
    states = list(dict.fromkeys(each["state"] for each in told))
    assert states[-2:] == ["running", "finished"] and "preparing" in states
    assert told[-1]["step"] == 4
    json.dumps(told, allow_nan=False)


def test_the_command_line_steers_the_jobs_of_a_server(
    bench: ComfyServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: str) -> str:
        status = main(["jobs", words[0], bench.url, *words[1:]])
        output = capsys.readouterr()
        assert status == 0, output.err
        return output.out

    for name in ("cat", "second", "third"):
        bench.run(kept_loaded(train(name)))
    first, second, third = (one["id"] for one in jobs(bench))
    until(lambda: jobs(bench)[0]["step"] >= 3, "step 3")
    assert told("list").splitlines()[-1].endswith(f"{second}, {third}")
    assert told("move", third, "0").split() == [third, second]
    assert json.loads(told("show", first))["config"]["steps"] == 10_000
    told("stop", second)
    told("stop", third)
    assert "of  10000 steps" in told("pause", first)
    until(lambda: jobs(bench)[0]["state"] == "paused", "the pause")
    step = jobs(bench)[0]["step"]
    assert len(told("losses", first).split()) == step
    told("resume", first)
    until(lambda: jobs(bench)[0]["step"] > step, "going on")
    told("stop", first)
    until(lambda: jobs(bench)[0]["state"] == "stopped", "the end")
    told("start", first)
    until(lambda: jobs(bench)[0]["state"] == "running", "the same job")
    assert main(["jobs", "delete", bench.url, first]) == 1
    assert "is at work. Stop or pause it first." in capsys.readouterr().err
    told("delete", second)
    assert len(jobs(bench)) == 2
    for where, why in ((f"{bench.url}/nowhere", "is not of this pack"), ("http://[", "answers at")):
        assert main(["jobs", "list", where]) == 1
        assert why in capsys.readouterr().err
