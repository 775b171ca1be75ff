"""What a training says of itself, and the nodes behind it, from the click to its end."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from custom_diffusion.concept.file import read_concept
from support.browser import (
    LONG_MS,
    SharedPage,
    card,
    contrast,
    in_palette,
    open_panel,
    press,
    screenshot,
    shared_page,
    until,
)
from support.comfy_server import ComfyServer
from support.graphs import Graph, draw, draw_pictures, node, teach

JOBS = "/custom_diffusion/jobs"
ENDED = ("finished", "stopped", "failed")
RENDERERS = pytest.mark.parametrize("vue_nodes", [False, True], ids=["classic", "vue"])
PALETTES = ("dark", "light")


@pytest.fixture(scope="module")
def server_of_this_file(comfyui_path: Path, checkpoints: Path, base: Path) -> Iterator[ComfyServer]:
    draw_pictures(base / "input" / "cat")
    with ComfyServer(comfyui_path, base, checkpoints=[checkpoints / "sd15.safetensors"]) as running:
        yield running


@pytest.fixture
def bench(server_of_this_file: ComfyServer) -> ComfyServer:
    """The server without the jobs and concepts of the test before."""
    server = server_of_this_file
    server.interrupt()
    for job in server.get(JOBS)["jobs"]:
        path = f"{JOBS}/{job['id']}"
        server.post(f"{path}/stop")
        while server.get(path)["state"] not in ENDED:
            time.sleep(0.05)
        server.delete(path)
    for concept in (server.models / "custom_diffusion").glob("*.*"):
        concept.unlink()
    return server


@pytest.fixture(scope="module")
def browser(server_of_this_file: ComfyServer) -> Iterator[SharedPage]:
    with shared_page(server_of_this_file) as shared:
        yield shared


@pytest.fixture
def page(bench: ComfyServer, browser: SharedPage) -> Iterator[Any]:
    with browser.anew() as page:
        yield page


def use(page: Any, *, vue_nodes: bool) -> None:
    page.evaluate(
        "vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)", vue_nodes
    )


def in_all_themes(page: Any, name: str, texts: list[Any]) -> None:
    """Texts can be told from what is behind them; axe finds no fault with nodes and panel. Of its
    rules one alone is about colours.
    """
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for palette in PALETTES:
        in_palette(page, palette)
        screenshot(page, f"{name}-{palette}")
        for text in texts:
            assert contrast(text) >= 4.5, (palette, text)
        rules = {} if palette == PALETTES[0] else {"runOnly": ["color-contrast"]}
        for part in (".cd-panel", ".cd-node"):
            if not page.locator(part).count():
                continue
            troubles = axe.run(page, context=part, options=rules).response["violations"]
            told = [(one["id"], [n["html"][:200] for n in one["nodes"]]) for one in troubles]
            assert not told, (palette, part)
    in_palette(page, "dark")


def show(page: Any, graph: Graph) -> None:
    page.evaluate("graph => app.loadApiJson(graph, 'test')", graph)
    page.wait_for_function(f"app.graph._nodes.length === {len(graph)}")
    page.evaluate(
        """() => {
            const boxes = app.graph._nodes;
            boxes.forEach((box, index) => {
                box.pos = [(index % 5) * 420, Math.floor(index / 5) * 760];
            });
            app.canvas.ds.scale = 0.5;
            app.canvas.ds.offset = [700, 160];
            app.canvas.setDirty(true, true);
        }"""
    )


def run(page: Any) -> None:
    page.evaluate("void app.queuePrompt(0, 1)")


def change(page: Any, comfy_class: str, **values: Any) -> None:
    page.evaluate(
        """([kind, values]) => {
            const found = app.graph._nodes.find(node => node.comfyClass === kind);
            for (const [name, value] of Object.entries(values)) {
                found.widgets.find(widget => widget.name === name).value = value;
            }
        }""",
        [comfy_class, values],
    )


def cat(**settings: Any) -> Graph:
    settings = {"steps": 10_000, "checkpoint_every_steps": 2, **settings}
    return teach("cat", "cat", "cat", "<new1>", **settings)


def picture_of_a_cat(**settings: Any) -> Graph:
    """A training, and a picture with what it has learnt."""
    return {**cat(**settings), **draw("photo of a <new1> cat", ["cat", 0])}


def jobs(server: ComfyServer) -> list[dict[str, Any]]:
    return server.get(JOBS)["jobs"]


def saved(server: ComfyServer) -> dict[str, int]:
    """Name of each concept that is saved → its steps."""
    files = (server.models / "custom_diffusion").glob("*.safetensors")
    return {file.name: read_concept(file).provenance["steps"] for file in files}


# One job, one file


def test_a_training_that_is_resumed_after_a_cancel_replaces_its_own_file(
    bench: ComfyServer, page: Any
) -> None:
    show(page, cat(steps=8))
    open_panel(page)
    run(page)
    training = page.locator(".cd-training")
    until(page, lambda: "learns: step" in training.inner_text())
    bench.interrupt()
    stopped = card(page, "stopped")
    assert list(saved(bench)) == ["cat.safetensors"] and saved(bench)["cat.safetensors"] < 8
    press(stopped, "Resume")
    card(page, "finished")
    assert saved(bench) == {"cat.safetensors": 8}
    screenshot(page, "card-one-file")


def test_a_file_that_somebody_put_in_its_place_is_left_alone(bench: ComfyServer) -> None:
    graph = cat(steps=8, wait=False)
    bench.run(graph)
    (job,) = jobs(bench)
    while bench.get(f"{JOBS}/{job['id']}")["step"] < 1:
        time.sleep(0.02)
    bench.post(f"{JOBS}/{job['id']}/stop")
    while bench.get(f"{JOBS}/{job['id']}")["state"] != "stopped":
        time.sleep(0.02)
    file = bench.models / "custom_diffusion" / "cat.safetensors"
    file.write_bytes(file.read_bytes() + b" ")
    edited = file.read_bytes()
    bench.run(
        {**graph, "cat": {**graph["cat"], "inputs": {**graph["cat"]["inputs"], "wait": True}}}
    )
    assert file.read_bytes() == edited
    assert jobs(bench)[0]["concept_file"] == "cat-2.safetensors"


# From the click to the first step


@RENDERERS
def test_from_the_click_to_the_last_step_there_is_one_bar_and_a_word(
    bench: ComfyServer, page: Any, vue_nodes: bool
) -> None:
    use(page, vue_nodes=vue_nodes)
    show(page, cat(steps=2, preview_every_steps=1, seed=10 + vue_nodes))
    open_panel(page)
    page.evaluate(
        """() => {
            window.seen = {node: [], panel: []};
            window.looks = setInterval(() => {
                for (const [place, bars] of Object.entries({
                    node: ".cd-node .cd-training", panel: ".cd-panel .cd-job",
                })) {
                    const shown = document.querySelector(bars);
                    const bar = shown?.querySelector("[role=progressbar]");
                    if (!bar?.hasAttribute("aria-valuenow")) continue;
                    const words = shown.querySelector(".cd-pace").textContent;
                    const now = [Number(bar.getAttribute("aria-valuenow")), words];
                    const last = window.seen[place].at(-1);
                    if (String(last) !== String(now)) window.seen[place].push(now);
                }
            }, 5);
        }"""
    )
    run(page)
    card(page, "finished")  # what is short is in what was seen meanwhile
    screenshot(page, f"card-one-bar-{'vue' if vue_nodes else 'classic'}")
    page.wait_for_timeout(500)
    seen = page.evaluate("clearInterval(looks), seen")
    for place, told in seen.items():
        percents = [percent for percent, _ in told]
        assert percents == sorted(percents), (place, told)
        assert percents[-1] == 100, (place, told)
        assert any(0 < percent < 10 for percent in percents), (place, told)
        words = " / ".join(text for _, text in told)
        assert re.search(r"encoding pictures \d+ of 3", words), (place, words)
        assert "drawing a sample" in words, (place, words)
        assert "undefined" not in words and "Doing" not in words, (place, words)
    assert "waits in ComfyUI's queue" in " ".join(text for _, text in seen["node"])
    assert "copying the model" in " ".join(text for _, text in seen["node"])


def test_a_training_that_cannot_be_prepared_leaves_no_bar_behind(
    bench: ComfyServer, page: Any
) -> None:
    graph = cat()
    graph["cat-data"]["inputs"]["initializer"] = "supercalifragilistic expialidocious"
    show(page, graph)
    panel = open_panel(page)
    run(page)
    error = page.locator(".cd-error .cd-trouble")
    error.wait_for(timeout=LONG_MS)
    until(page, lambda: not page.locator(".cd-training").count())
    panel.get_by_text("No training yet").wait_for()


# In the background


@RENDERERS
def test_nodes_behind_a_background_training_say_that_they_wait_and_that_a_picture_is_old(
    bench: ComfyServer, page: Any, vue_nodes: bool
) -> None:
    use(page, vue_nodes=vue_nodes)
    show(page, picture_of_a_cat(steps=2, seed=20 + vue_nodes))
    run(page)
    page.wait_for_function(
        """() => {
            const image = app.graph._nodes.find(node => node.comfyClass === "SaveImage");
            return image.imgs?.length || app.nodeOutputs[image.id]?.images?.length;
        }""",
        timeout=LONG_MS,
    )
    assert not page.locator(".cd-behind").count()

    change(
        page, "CustomDiffusionTrain", wait=False, seed=30 + vue_nodes, **{"method.steps": 10_000}
    )
    run(page)
    behind = page.locator(".cd-behind")
    until(page, lambda: behind.count() == 2)  # what applies the concept, and what shows a picture
    until(page, lambda: "learns" in behind.first.inner_text())
    told = behind.all_inner_texts()
    assert all("“cat” is still training in the background" in text for text in told)
    assert all("run the workflow again" in text for text in told)
    old = [text for text in told if "The picture here is from an earlier run." in text]
    assert len(old) == 1
    kinds = page.evaluate(
        """app.graph._nodes.filter(n => n.widgets?.some(w => w.name === "runs"))
            .map(n => n.comfyClass).toSorted()"""
    )
    assert {"ApplyKVDelta", "SaveImage"} <= set(kinds)
    in_all_themes(page, f"card-behind-{'vue' if vue_nodes else 'classic'}", behind.all())

    # A reload keeps it; so does running again while it learns, when nothing of it is executed anew.
    run(page)
    page.wait_for_timeout(1500)
    assert behind.count() == 2
    workflow = page.evaluate("app.graph.serialize()")
    page.reload()
    page.wait_for_function("window.app?.extensionManager?.workflow?.activeWorkflow?.isLoaded")
    page.wait_for_function("!!window.LiteGraph.registered_node_types.CustomDiffusionTrain")
    page.evaluate("flow => app.loadGraphData(flow, true, true, 'after the reload')", workflow)
    until(page, lambda: behind.count() == 2)
    until(page, lambda: "learns" in behind.first.inner_text())

    (job,) = [job for job in jobs(bench) if job["state"] == "running"]
    bench.post(f"{JOBS}/{job['id']}/stop")
    until(page, lambda: "ended early (stopped)" in behind.first.inner_text())
    change(page, "CustomDiffusionTrain", wait=True, seed=20 + vue_nodes, **{"method.steps": 2})
    run(page)  # the first training, which has finished: now all nodes run
    until(page, lambda: behind.count() == 0)
    use(page, vue_nodes=False)


# A prompt that waits


def test_pausing_a_job_that_a_prompt_waits_for_says_so_and_lets_it_go_when_asked(
    bench: ComfyServer, page: Any
) -> None:
    show(page, picture_of_a_cat())
    panel = open_panel(page)
    run(page)
    running = card(page, "running")
    release = running.get_by_role("button", name="Let the prompt go")
    release.wait_for()
    press(running, "Pause")
    paused = card(page, "paused")
    sentence = "a prompt waits for it: nothing else in the queue runs"
    until(page, lambda: sentence in paused.inner_text())
    assert sentence in page.locator(".cd-training").inner_text()
    assert bench.get("/queue")["queue_running"]
    in_all_themes(page, "card-queue-waits", [paused.locator(".cd-pace")])

    press(paused, "Let the prompt go")
    until(page, lambda: not bench.get("/queue")["queue_running"])
    until(page, lambda: sentence not in paused.inner_text())
    assert not paused.get_by_role("button", name="Let the prompt go").is_visible()
    assert not panel.locator(".cd-trouble").first.inner_text()
    behind = page.locator(".cd-behind")
    until(page, lambda: behind.count() == 2)
    (job,) = jobs(bench)
    assert job["state"] == "paused" and not job["awaited"]

    # The same prompt again waits for it again, though nothing of it has changed.
    run(page)
    card(page, "running")
    until(page, lambda: jobs(bench)[0]["awaited"])
    until(page, lambda: behind.count() == 0)
    bench.interrupt()
    card(page, "stopped")


def test_nobody_waits_for_a_job_in_the_background(bench: ComfyServer, page: Any) -> None:
    bench.run(cat(wait=False))
    open_panel(page)
    running = card(page, "running")
    assert not running.get_by_role("button", name="Let the prompt go").is_visible()
    press(running, "Pause")
    assert "a prompt waits" not in card(page, "paused").inner_text()


# Errors


@RENDERERS
def test_an_error_of_a_background_job_stands_on_its_node_to_be_copied(
    bench: ComfyServer, page: Any, vue_nodes: bool
) -> None:
    use(page, vue_nodes=vue_nodes)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    folder = bench.models / "custom_diffusion"
    folder.rename(folder.with_name("away"))
    folder.write_text("no folder")
    try:
        show(page, cat(steps=2, wait=False, seed=40 + vue_nodes))
        run(page)
        error = page.locator(".cd-training .cd-trouble")
        error.wait_for(timeout=LONG_MS)
        sentence = error.inner_text()
        assert "could not be written" in sentence and "Traceback" not in sentence
        page.keyboard.press("Escape")
        press(page.locator(".cd-training .cd-error"), "Copy")
        assert page.evaluate("navigator.clipboard.readText()") == sentence
        assert error.evaluate("text => getComputedStyle(text).userSelect") == "text"
        in_all_themes(page, f"card-error-{'vue' if vue_nodes else 'classic'}", [error])
        assert "Traceback" in bench.log()
    finally:
        folder.unlink()
        folder.with_name("away").rename(folder)
        use(page, vue_nodes=False)


# Subgraphs


def test_in_subgraphs_each_use_shows_its_own_training(bench: ComfyServer, page: Any) -> None:
    graph = cat(wait=False)
    show(page, {**graph, "other": node("PreviewAny", source=["cat", 2])})
    page.evaluate(
        """() => {
            const train = app.graph._nodes.find(n => n.comfyClass === "CustomDiffusionTrain");
            app.graph.convertToSubgraph(new Set([train])).node.title = "teaching";
        }"""
    )
    run(page)
    until(page, lambda: len(jobs(bench)) == 1)
    bench.run(cat(wait=False, seed=9, name="another"))  # of a script: no node of the page began it
    page.evaluate("app.canvas.setGraph([...app.graph.subgraphs.values()][0])")
    training = page.locator(".cd-training")
    training.wait_for()
    until(page, lambda: "learns" in training.inner_text())
    assert training.count() == 1
    workflow = page.evaluate("app.graph.serialize()")
    page.evaluate("flow => app.loadGraphData(flow, true, true, 'again')", workflow)
    page.wait_for_function("app.graph.subgraphs.size === 1")
    page.evaluate("app.canvas.setGraph([...app.graph.subgraphs.values()][0])")
    until(page, lambda: training.count() == 1 and "learns" in training.inner_text())
    first, _ = sorted(jobs(bench), key=lambda job: job["id"])
    bench.post(f"{JOBS}/{first['id']}/stop")
    until(page, lambda: "stopped" in training.inner_text())
    screenshot(page, "card-subgraph")


def test_a_workflow_saved_under_another_name_shows_nothing_that_never_ran_in_it(
    bench: ComfyServer, page: Any
) -> None:
    show(page, cat(wait=False, steps=2))
    run(page)
    page.locator(".cd-training").wait_for(timeout=LONG_MS)
    workflow = page.evaluate("app.graph.serialize()")
    never_ran = {**workflow, "id": "7a2c1e0f-1111-4222-8333-444455556666"}
    page.evaluate("flow => app.loadGraphData(flow, true, true, 'another')", never_ran)
    page.wait_for_function(f"app.graph.id !== '{workflow['id']}'")
    page.wait_for_timeout(500)
    assert not page.locator(".cd-training").count()


# Lists of concepts


def test_load_concept_shows_what_a_training_has_put_in_the_file(
    bench: ComfyServer, page: Any
) -> None:
    bench.run(cat(steps=8, wait=False))
    open_panel(page)
    press(card(page, "running"), "Stop and save")
    stopped = card(page, "stopped")
    ((name, steps),) = saved(bench).items()
    assert steps < 8
    page.evaluate("app.refreshComboInNodes()")
    show(page, {"load": node("LoadConcept", concept_name=name, rename_token="")})
    shown = page.locator(".cd-node .cd-concept")
    shown.get_by_text(f", {steps} steps").wait_for()
    press(stopped, "Resume")
    card(page, "finished")
    shown.get_by_text(", 8 steps").wait_for()
