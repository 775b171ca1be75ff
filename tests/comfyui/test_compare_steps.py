"""Which step is best: pictures kept back, the sheet of a job's steps, and a step that is taken from
it, with ComfyUI's own graph and page as judges.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from custom_diffusion.concept.file import read_concept
from support.browser import (
    LONG_MS,
    SharedPage,
    card,
    open_panel,
    press,
    screenshot,
    shared_page,
    until,
)
from support.comfy_server import PACK_FOLDER, ComfyPromptError, ComfyServer, ComfyServerError
from support.graphs import Graph, draw, draw_pictures, node, teach

JOBS = "/custom_diffusion/jobs"
MODULES = f"/extensions/{PACK_FOLDER}/js"
STEPS = 6
MODELS = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "vae": ["checkpoint", 2]}


def watched(name: str, **settings: Any) -> Graph:
    """A training that keeps every other step, and measures at each of them."""
    settings = {
        "steps": STEPS,
        "checkpoint_every_steps": 2,
        "keep_best": 10,
        "validation_pictures": 1,
        "validation_every_steps": 2,
        "gradient_cut": "own words",
        **settings,
    }
    return teach(name, "cat", "cat", "<new1>", **settings)


def compared(job: str, **inputs: Any) -> Graph:
    options = {
        "job_id": job,
        "prompt": "photo of a <new1> cat",
        "negative": "",
        "steps": "",
        "strengths": "0, 1",
        "seeds": "7, 8",
        "sampling_steps": 2,
        "cfg": 5.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "resolution": 64,
        **inputs,
    }
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"),
        "sheet": node("CompareSteps", **MODELS, **options),
        "image": node("SaveImage", images=["sheet", 1], filename_prefix="cell"),
    }


@pytest.fixture(scope="module")
def bench(comfyui_path: Path, checkpoints: Path, base: Path) -> Iterator[ComfyServer]:
    draw_pictures(base / "input" / "cat", count=4)
    with ComfyServer(comfyui_path, base, checkpoints=[checkpoints / "sd15.safetensors"]) as running:
        yield running


@pytest.fixture(scope="module")
def job(bench: ComfyServer) -> str:
    bench.run(watched("cat"))
    (found,) = [job for job in bench.get(JOBS)["jobs"] if job["name"] == "cat"]
    assert found["state"] == "finished"
    return found["id"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def cells(bench: ComfyServer, job: str) -> list[np.ndarray]:
    """Of steps 2, 4, 6, each at strengths 0 and 1, each with the seeds 7 and 8."""
    entry = bench.run(compared(job))
    assert "steps 2, 4, 6: photo of a <new1> cat" in entry["outputs"]["sheet"]["text"][0]
    (sheet,) = bench.images(entry, "sheet")
    assert sheet.shape[0] > 3 * 192 and sheet.shape[1] > 4 * 192
    pictures = bench.images(entry, "image")
    assert len(pictures) == 12
    return pictures


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """But for the half precision of files."""
    return np.abs(one.astype(int) - other.astype(int)).max() <= 2  # type: ignore[no-any-return]


def folder(bench: ComfyServer, job: str) -> Path:
    return bench.output / "custom_diffusion" / "jobs" / job


def test_what_is_measured_is_told_and_kept(bench: ComfyServer, job: str) -> None:
    metrics = bench.get(f"{JOBS}/{job}/metrics")
    assert len(metrics["losses"]) == STEPS and list(metrics["validation"]) == ["2", "4", "6"]
    assert list(bench.get(f"{JOBS}/{job}/metrics?after=4")["validation"]) == ["6"]
    lines = (folder(bench, job) / "metrics.jsonl").read_text().splitlines()
    on_disk = {
        str(line["step"]): line["validation"]
        for line in map(json.loads, lines)
        if "validation" in line
    }
    assert on_disk == metrics["validation"]
    concept = read_concept(bench.models / "custom_diffusion" / "cat.safetensors")
    assert concept.provenance["instance_images"] == 3


def test_without_strength_every_step_draws_what_the_model_does(
    bench: ComfyServer, cells: list[np.ndarray]
) -> None:
    base = bench.images(bench.run(draw("photo of a <new1> cat")), "image")[0]
    assert all(alike(cells[place], base) for place in (0, 4, 8))
    assert not alike(cells[0], cells[1])


def test_a_step_that_is_taken_draws_what_its_picture_shows(
    bench: ComfyServer, job: str, cells: list[np.ndarray]
) -> None:
    path = f"{JOBS}/{job}/comparison"
    sheet = bench.get(path)
    assert (sheet["steps"], sheet["strengths"], sheet["seeds"]) == ([2, 4, 6], [0, 1], [7, 8])
    assert sheet["pictures"] == list(range(12))
    picture = bench.get_bytes(f"{path}/pictures/6")
    names = set()
    for _ in range(2):  # a name that is taken has a number
        taken = bench.post(f"{path}/take", {"picture": 6, "name": "cat"})
        names.add(taken["file"])
        file = bench.models / "custom_diffusion" / taken["file"]
        assert taken["steps"] == 4 and taken["thumbnail"]
        assert file.with_suffix(".preview.png").read_bytes() == picture
        loaded = {"c": node("LoadConcept", concept_name=taken["file"], rename_token="")}
        drawn = bench.run({**draw("photo of a <new1> cat", ["c", 0]), **loaded})
        assert alike(bench.images(drawn, "image")[0], cells[6])
        assert not alike(cells[6], cells[4])
    assert "cat.safetensors" not in names and len(names) == 2
    for body, status in (({"picture": 12, "name": "x"}, 404), ({"picture": 1}, 400)):
        with pytest.raises(ComfyServerError) as caught:
            bench.post(f"{path}/take", body)
        assert caught.value.status == status


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"steps": "3"}, r"has not kept step 3; it has 2, 4, 6"),
        ({"steps": "two"}, r"steps='two' are no numbers from 1"),
        ({"strengths": "nan"}, r"strengths='nan' are no numbers from -4 to 4"),
        ({"seeds": ""}, r"seeds='' are no numbers from 0"),
        ({"seeds": " ".join(map(str, range(80)))}, r"are 480 pictures; a sheet has 100 at most"),
        ({"job": "none"}, r"There is no training job 'none'"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    bench: ComfyServer, job: str, inputs: Any, message: str
) -> None:
    with pytest.raises(ComfyPromptError, match=message):
        bench.run(compared(**{"job": job, **inputs}))


def test_a_job_that_is_deleted_while_its_sheet_is_drawn_is_named(bench: ComfyServer) -> None:
    bench.run(watched("gone", steps=2))
    (gone,) = [each["id"] for each in bench.get(JOBS)["jobs"] if each["name"] == "gone"]
    prompt = bench.queue(compared(gone, seeds=" ".join(map(str, range(50)))))
    wait_for_pictures(bench, gone)
    bench.delete(f"{JOBS}/{gone}")
    with pytest.raises(ComfyPromptError, match=f"{gone} was deleted while its steps were compared"):
        bench.wait(prompt)
    assert not folder(bench, gone).exists()


def wait_for_pictures(bench: ComfyServer, job: str) -> None:
    end = time.monotonic() + LONG_MS / 1000
    while bench.get(f"{JOBS}/{job}")["compared"] < 2:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_run_that_has_ended_early_is_not_done_again_and_can_be_extended(
    bench: ComfyServer,
) -> None:
    graph = watched(
        "early", steps=40, early_stopping="on", patience_steps=2, **{"learning_rate": 0.1}
    )
    bench.run(graph)
    (early,) = [each for each in bench.get(JOBS)["jobs"] if each["name"] == "early"]
    assert early["state"] == "finished" and early["step"] < 40
    assert f"the training ended at step {early['step']} and keeps" in early["notes"][0]
    validation = bench.get(f"{JOBS}/{early['id']}/metrics")["validation"]
    best = min(validation, key=validation.get)
    saved = read_concept(bench.models / "custom_diffusion" / "early.safetensors")
    assert saved.provenance["steps"] == int(best) < early["step"]
    count = len(bench.get(JOBS)["jobs"])
    bench.run(graph)
    assert len(bench.get(JOBS)["jobs"]) == count
    graph["early"]["inputs"] |= {"method.steps": early["step"] + 3, "early_stopping": "suggested"}
    bench.run(graph)
    longer = bench.get(JOBS)["jobs"][-1]
    assert (longer["name"], longer["step"]) == ("early", early["step"] + 3)
    metrics = bench.get(f"{JOBS}/{longer['id']}/metrics")
    earlier = bench.get(f"{JOBS}/{early['id']}/metrics")
    assert metrics["losses"][: early["step"]] == earlier["losses"]


# In the page


@pytest.fixture(scope="module")
def browser(bench: ComfyServer) -> Iterator[SharedPage]:
    with shared_page(bench) as shared:
        yield shared


@pytest.fixture
def page(bench: ComfyServer, browser: SharedPage) -> Iterator[Any]:
    with browser.anew() as page:
        yield page


def test_the_chart_shows_what_was_measured(page: Any) -> None:
    shown = page.evaluate(
        """async modules => {
            const { LossChart } = await import(`${modules}/loss_chart.js`);
            const chart = new LossChart();
            document.body.append(chart.element);
            const drawn = name => chart.element.querySelector(name).getAttribute("d");
            const losses = Array.from({length: 9}, (_, step) => 1 - step / 10);
            chart.show(losses);
            const without = [drawn(".cd-measured"), chart.caption.textContent];
            chart.show(losses, new Map([[6, 0.3], [3, 0.6], [9, 0.5]]));
            const all = [drawn(".cd-validation"), drawn(".cd-measured"), drawn(".cd-best")];
            const last = chart.caption.textContent;
            const press = key => chart.svg.dispatchEvent(new KeyboardEvent("keydown", {key}));
            press("Home");
            const first = chart.caption.textContent;
            for (let step = 1; step < 4; step++) press("ArrowRight");
            return {without, all, last, first, fourth: chart.caption.textContent};
        }""",
        MODULES,
    )
    assert shown["without"][0] == "" and "validation" not in shown["without"][1]
    line, dots, best = shown["all"]
    places = [point.split() for point in line[1:].split("L")]
    assert [round(float(x)) for x, _ in places] == [75, 188, 300]
    heights = [float(y) for _, y in places]
    assert heights[0] < heights[2] < heights[1]  # the lower the loss, the further down
    assert dots.count("M") == 3 and best == "M{0} {1}L{0} {1}".format(*places[1])
    assert shown["last"].endswith("validation 0.500 at step 9, lowest 0.300 at step 6")
    assert "validation" not in shown["first"]
    assert shown["fourth"].endswith("validation 0.600 at step 3, lowest 0.300 at step 6")


def test_a_click_on_a_picture_takes_its_step(bench: ComfyServer, page: Any) -> None:
    for each in bench.get(JOBS)["jobs"]:
        bench.delete(f"{JOBS}/{each['id']}")
    bench.run(watched("my cat", keep_best=2, steps=4))

    def hasten(route: Any) -> None:
        """One sampling step for each picture, of 25."""
        body = route.request.post_data_json
        sheet = body["prompt"]["compare-steps"]
        assert sheet["class_type"] == "CompareSteps"
        sheet["inputs"]["sampling_steps"] = 1
        assert "my cat" not in body["prompt"]  # nothing is trained again
        route.continue_(post_data=json.dumps(body))

    page.route("**/prompt", hasten)
    open_panel(page)
    finished = card(page, "finished")
    until(page, lambda: "validation" in finished.locator("figcaption").inner_text())
    press(finished, "Compare steps")
    dialog = page.get_by_role("dialog")
    dialog.wait_for()
    assert dialog.locator("input").input_value() == "photo of a <new1> cat"
    dialog.locator("input").press("Enter")
    pictures = finished.locator(".cd-compared")
    until(page, lambda: pictures.count() == 12)  # of two steps, three strengths, two seeds
    until(page, lambda: pictures.first.locator("img").evaluate("i => i.naturalWidth") == 64)
    screenshot(page, "panel-steps")
    files = {path.name for path in (bench.models / "custom_diffusion").iterdir()}
    finished.get_by_role(
        "button", name="Save step 2 as a concept (drawn with strength 0.8, seed 1)"
    ).click()
    dialog.wait_for()
    assert dialog.locator("input").input_value() == "my cat step 2"
    dialog.locator("input").press("Enter")
    finished.get_by_text("Step 2 is saved as my-cat-step-2.safetensors.").wait_for()
    now = {path.name for path in (bench.models / "custom_diffusion").iterdir()}
    assert now - files == {"my-cat-step-2.safetensors", "my-cat-step-2.preview.png"}
    concept = read_concept(bench.models / "custom_diffusion" / "my-cat-step-2.safetensors")
    assert concept.provenance["steps"] == 2
