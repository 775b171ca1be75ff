"""The panel in ComfyUI's page, beside real trainings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import contrast, page_of
from support.comfy_server import PACK_FOLDER, ComfyServer
from support.graphs import draw_pictures, teach

JOBS = "/custom_diffusion/jobs"
TAB = "custom-diffusion-trainings"
LONG_MS = 120_000
SCREENSHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"
MODULES = f"/extensions/{PACK_FOLDER}/js"


@pytest.fixture(scope="module")
def server_of_this_file(
    comfyui_path: Path, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("panel")
    draw_pictures(base / "input" / "cat")
    with ComfyServer(comfyui_path, base, checkpoints=[checkpoints / "sd15.safetensors"]) as running:
        yield running


@pytest.fixture
def bench(server_of_this_file: ComfyServer) -> ComfyServer:
    """The server without jobs of the test before."""
    server = server_of_this_file
    for job in server.get(JOBS)["jobs"]:
        path = f"{JOBS}/{job['id']}"
        server.post(f"{path}/stop")
        while server.get(path)["state"] not in ("finished", "stopped", "failed"):
            time.sleep(0.05)
        server.delete(path)
    return server


@pytest.fixture
def page(bench: ComfyServer) -> Iterator[Any]:
    troubles: list[str] = []
    with page_of(bench, troubles) as page:
        page.evaluate("app.graph.clear()")
        yield page
    assert not troubles


def train(name: str = "my cat", **settings: Any) -> dict[str, Any]:
    settings = {
        "steps": 10_000,
        "wait": False,
        "checkpoint_every_steps": 2,
        "preview_every_steps": 2,
        **settings,
    }
    return teach(name, "cat", "cat", "<new1>", **settings)


def open_panel(page: Any) -> Any:
    page.evaluate(f"void app.extensionManager.command.execute('Workspace.ToggleSidebarTab.{TAB}')")
    panel = page.locator(".cd-panel")
    panel.wait_for()
    return panel


def card(page: Any, state: str) -> Any:
    """The card of the only job, when it is in that state."""
    found = page.locator(f".cd-job[data-state={state}]")
    found.wait_for(timeout=LONG_MS)
    return found


def press(where: Any, label: str) -> None:
    where.get_by_role("button", name=label, exact=True).click()


def until(page: Any, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG_MS / 1000
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        page.wait_for_timeout(50)


def screenshot(page: Any, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def test_a_training_is_watched_and_steered_to_its_end(bench: ComfyServer, page: Any) -> None:
    panel = open_panel(page)
    assert "No training yet" in panel.inner_text()
    screenshot(page, "panel-empty")

    bench.run(train())
    running = card(page, "running")
    assert page.locator(f".{TAB}-tab-button, [data-testid={TAB}-tab-button]").inner_text() == "1"
    step = int(running.locator("progress").get_attribute("value"))
    until(page, lambda: int(running.locator("progress").get_attribute("value")) > step + 3)
    until(page, lambda: "loss at step" in running.locator("figcaption").inner_text())
    assert "teaches <new1> cat" in running.inner_text()
    pictures = running.locator(".cd-sample img")
    until(page, lambda: pictures.count() > 0 and pictures.first.evaluate("i => i.naturalWidth") > 0)
    running.locator(".cd-chart svg").hover(position={"x": 2, "y": 20})
    screenshot(page, "panel-running")

    press(running, "Pause")
    paused = card(page, "paused")
    screenshot(page, "panel-paused")
    press(paused, "Go on")
    press(card(page, "running"), "Stop and save")
    stopped = card(page, "stopped")

    press(stopped, "Add to graph")
    until(page, lambda: page.evaluate("app.graph._nodes.length") == 2)
    graph = page.evaluate("app.graphToPrompt().then(made => made.output)")
    (load,) = (key for key, made in graph.items() if made["class_type"] == "LoadConcept")
    (apply,) = (made for made in graph.values() if made["class_type"] == "ApplyKVDelta")
    assert graph[load]["inputs"]["concept_name"] == "my-cat.safetensors"
    assert apply["inputs"]["concept"] == [load, 0]
    screenshot(page, "panel-added-to-graph")

    press(stopped, "Go on")
    press(card(page, "running"), "Stop and save")
    press(card(page, "stopped"), "Delete")
    dialog = page.get_by_role("dialog")
    dialog.wait_for()
    screenshot(page, "panel-delete")
    dialog.get_by_role("button", name="Delete").click()
    panel.get_by_text("No training yet").wait_for()
    assert bench.get(JOBS)["jobs"] == []


def test_a_failed_training_says_why_and_goes_on_when_that_is_mended(
    bench: ComfyServer, page: Any
) -> None:
    folder = bench.models / "custom_diffusion"
    folder.rename(folder.with_name("away"))
    folder.write_text("no folder")
    bench.run(train(steps=2))
    open_panel(page)
    failed = card(page, "failed")
    if failed.get_attribute("open") is None:
        failed.locator("summary").click()
    assert "could not be written" in failed.inner_text()
    screenshot(page, "panel-failed")
    folder.unlink()
    folder.with_name("away").rename(folder)
    press(failed, "Go on")
    card(page, "finished")


def test_the_panel_survives_a_reload_and_a_restart_of_the_server(
    bench: ComfyServer, page: Any
) -> None:
    bench.run(train())
    open_panel(page)
    card(page, "running")
    page.reload()
    page.wait_for_function("!!window.app?.extensionManager?.getSidebarTabs", timeout=LONG_MS)
    page.wait_for_function(
        f"app.extensionManager.getSidebarTabs().some(tab => tab.id === '{TAB}' && tab.iconBadge)"
    )
    if not page.locator(".cd-panel").count():
        open_panel(page)
    card(page, "running")
    port = bench.port
    bench.stop()
    bench.start(port)
    paused = card(page, "paused")  # without a click: the page has found the server again
    if paused.get_attribute("open") is None:
        paused.locator("summary").click()
    press(paused, "Go on")  # its models are not loaded: the graph is queued
    card(page, "running")


@pytest.mark.parametrize("palette", ["dark", "light"])
@pytest.mark.parametrize("vue_nodes", [False, True])
def test_it_looks_native(bench: ComfyServer, page: Any, palette: str, vue_nodes: bool) -> None:
    """Looked at; what can be computed is whether text can be told from its background."""
    page.evaluate(f"app.extensionManager.setting.set('Comfy.ColorPalette', '{palette}')")
    page.evaluate(
        f"app.extensionManager.setting.set('Comfy.VueNodes.Enabled', {str(vue_nodes).lower()})"
    )
    bench.run(train())
    open_panel(page)
    running = card(page, "running")
    until(page, lambda: running.locator(".cd-sample").count() > 1)
    screenshot(page, f"panel-{palette}-{'vue' if vue_nodes else 'classic'}")
    assert contrast(running.locator(".cd-name")) > 4.5
    assert contrast(running.locator(".cd-pace")) > 3


def test_what_the_chart_computes(page: Any) -> None:
    computed = page.evaluate(
        """async modules => {
            const chart = await import(`${modules}/loss_chart.js`);
            const card = await import(`${modules}/job_card.js`);
            return {
                constant: chart.smoothed([2, 2, 2, 2]),
                gap: chart.smoothed([null, 1, null, 3], 0.5),
                few: chart.thinned([5, null, 7], 10),
                many: chart.thinned(Array.from({length: 1000}, (_, i) => i), 10),
                outlier: chart.range([...Array(100).keys(), 1000]),
                flat: chart.range([3, 3]),
                times: [0.2, 59, 75, 3700].map(card.duration),
            };
        }""",
        MODULES,
    )
    assert computed["constant"] == pytest.approx([2] * 4)
    assert computed["gap"][0] is None
    # Weights 1 and 0.5 by age, no bias towards 0 at the beginning.
    assert computed["gap"][1:] == pytest.approx([1, 1, (0.5 * 3 + 0.25 * 1) / 0.75])
    assert computed["few"] == [[1, 5], [3, 7]]
    assert len(computed["many"]) == 10
    assert computed["many"][0] == [50.5, 49.5]  # steps 1 to 100 with the values 0 to 99
    assert computed["outlier"] == [0, 98]
    assert computed["flat"] == [2.5, 3.5]
    assert computed["times"] == ["1 s", "59 s", "1 min 15 s", "1 h 1 min"]
