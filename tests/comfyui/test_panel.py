"""The panel in ComfyUI's page, beside real trainings."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from custom_diffusion.concept.file import write_concept
from custom_diffusion.formats.exporting import export_concept
from PIL import Image
from support.browser import (
    LONG_MS,
    TAB,
    SharedPage,
    card,
    contrast,
    in_palette,
    open_panel,
    press,
    screenshot,
    second_tab,
    shared_page,
    until,
)
from support.comfy_server import PACK_FOLDER, ComfyServer
from support.graphs import draw_pictures, teach
from support.made_concepts import made_concept

JOBS = "/custom_diffusion/jobs"
LAYER = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
MODULES = f"/extensions/{PACK_FOLDER}/js"


@pytest.fixture(scope="module")
def server_of_this_file(comfyui_path: Path, checkpoints: Path, base: Path) -> Iterator[ComfyServer]:
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


@pytest.fixture(scope="module")
def browser(server_of_this_file: ComfyServer) -> Iterator[SharedPage]:
    with shared_page(server_of_this_file) as shared:
        yield shared


@pytest.fixture
def page(bench: ComfyServer, browser: SharedPage) -> Iterator[Any]:
    with browser.anew() as page:
        yield page


def train(name: str = "my cat", **settings: Any) -> dict[str, Any]:
    settings = {"steps": 10_000, "wait": False, "checkpoint_every_steps": 2, **settings}
    return teach(name, "cat", "cat", "<new1>", **settings)


def step_of(bar: Any) -> int:
    """Of a bar, as a screen reader says it."""
    (step,) = re.findall(r"step (\d+) of", bar.get_attribute("aria-valuetext"))
    return int(step)


def test_a_training_is_watched_and_steered_to_its_end(bench: ComfyServer, page: Any) -> None:
    panel = open_panel(page)
    assert "No training yet" in panel.inner_text()
    screenshot(page, "panel-empty")

    bench.run(train(preview_every_steps=4))
    running = card(page, "running")
    assert page.locator(f".{TAB}-tab-button, [data-testid={TAB}-tab-button]").inner_text() == "1"
    bar = running.get_by_role("progressbar", name="progress of my cat")
    step = step_of(bar)
    until(page, lambda: step_of(bar) > step + 3)
    until(page, lambda: "loss at step" in running.locator("figcaption").inner_text())
    assert "teaches <new1> cat" in running.inner_text()
    pictures = running.locator(".cd-sample img")
    until(page, lambda: pictures.count() > 0 and pictures.first.evaluate("i => i.naturalWidth") > 0)
    running.locator(".cd-chart svg").hover(position={"x": 2, "y": 20})
    screenshot(page, "panel-running")

    press(running, "Pause")
    paused = card(page, "paused")
    screenshot(page, "panel-paused")
    press(paused, "Resume")
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

    press(stopped, "Resume")
    press(card(page, "running"), "Stop and save")
    press(card(page, "stopped"), "Delete")
    dialog = page.get_by_role("dialog")
    dialog.wait_for()
    screenshot(page, "panel-delete")
    dialog.get_by_role("button", name="Delete").click()
    panel.get_by_text("No training yet").wait_for()
    assert bench.get(JOBS)["jobs"] == []


def test_the_bar_fills_as_far_as_the_training_is(bench: ComfyServer, page: Any) -> None:
    bench.run(train(steps=40))
    open_panel(page)
    card(page, "running")
    bar = page.locator(".cd-job").get_by_role("progressbar")
    until(page, lambda: step_of(bar) > 2)
    press(card(page, "running"), "Pause")
    card(page, "paused")
    page.wait_for_function(
        "bar => !bar.getAnimations({subtree: true}).length", arg=bar.element_handle()
    )
    share = float(bar.get_attribute("aria-valuenow")) / 100
    # A tenth is for encoding the pictures, which was done before there was a job.
    assert share == pytest.approx(0.1 + 0.9 * step_of(bar) / 40, abs=1e-3)
    assert 0.1 < share < 1
    pixels = np.asarray(Image.open(io.BytesIO(bar.screenshot())).convert("RGB"), dtype=int)
    row = pixels[len(pixels) // 2]
    filled = np.abs(row - row[len(row) - 4]).sum(1) > 100  # unlike the empty end
    assert filled.mean() == pytest.approx(share, abs=0.03)


def test_the_state_follows_a_click_at_once_and_a_second_one_is_harmless(
    bench: ComfyServer, page: Any
) -> None:
    bench.run(train())
    panel = open_panel(page)
    sent: list[str] = []
    page.on("request", lambda asked: asked.method == "POST" and sent.append(asked.url))
    clicks = """([button, state]) => {
        button.click();
        button.click();
        return state.textContent;
    }"""
    for state, verb, at_once, then in (
        ("running", "Pause", "pausing …", "paused"),
        ("paused", "Resume", "resuming …", "running"),
        ("running", "Stop and save", "stopping and saving …", "stopped"),
        ("stopped", "Resume", "resuming …", "running"),
    ):
        sent.clear()
        shown = card(page, state)
        button = shown.get_by_role("button", name=verb, exact=True)
        button.focus()
        parts = [button.element_handle(), shown.locator(".cd-state").element_handle()]
        assert page.evaluate(clicks, parts) == at_once
        card(page, then)
        assert len([url for url in sent if "custom_diffusion" in url or "/prompt" in url]) == 1
        assert not panel.locator(".cd-trouble").first.inner_text()
        # The keyboard stays where it was, at what can be done now.
        assert page.evaluate("document.activeElement.closest('.cd-buttons') !== null")

    # A graph that cannot run again: the state is what it was, and why is said.
    press(card(page, "running"), "Stop and save")
    stopped = card(page, "stopped")
    checkpoint = bench.models / "checkpoints" / "sd15.safetensors"
    checkpoint.rename(checkpoint.with_suffix(".away"))
    try:
        press(stopped, "Resume")
        panel.get_by_text("sd15.safetensors").wait_for()
        assert stopped.locator(".cd-state").inner_text().endswith("stopped")
    finally:
        checkpoint.with_suffix(".away").rename(checkpoint)


def test_a_word_that_moved_far_is_said_in_plain_words(bench: ComfyServer, page: Any) -> None:
    bench.run(train(steps=10, learning_rate=0.02))
    open_panel(page)
    finished = card(page, "finished")
    warning = finished.locator(".cd-warning")
    warning.wait_for()
    assert "<new1> has moved very far from where it began" in warning.inner_text()
    assert "%" not in finished.inner_text()
    for palette in ("dark", "light"):
        in_palette(page, palette)
        assert contrast(warning) >= 4.5, palette
        screenshot(page, f"panel-drift-{palette}")
    in_palette(page, "dark")


def test_a_failed_training_says_why_and_goes_on_when_that_is_mended(
    bench: ComfyServer, page: Any
) -> None:
    folder = bench.models / "custom_diffusion"
    folder.rename(folder.with_name("away"))
    folder.write_text("no folder")
    bench.run(train(steps=2))
    open_panel(page)
    failed = card(page, "failed")
    assert "could not be written" in failed.inner_text()
    failed.get_by_text("Log", exact=True).click()
    until(page, lambda: "Traceback" in failed.locator("pre").inner_text())
    screenshot(page, "panel-failed")
    folder.unlink()
    folder.with_name("away").rename(folder)
    press(failed, "Resume")
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
    press(paused, "Resume")  # its models are not loaded: the graph is queued
    card(page, "running")


def test_it_looks_native(bench: ComfyServer, page: Any) -> None:
    """Looked at; what can be computed is whether text can be told from its background."""
    bench.run(train(preview_every_steps=4))
    open_panel(page)
    running = card(page, "running")
    until(page, lambda: running.locator(".cd-sample").count() > 0)
    for palette in ("dark", "light"):
        for vue_nodes in (False, True):
            page.evaluate(
                "vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)", vue_nodes
            )
            in_palette(page, palette)
            screenshot(page, f"panel-{palette}-{'vue' if vue_nodes else 'classic'}")
            assert contrast(running.locator(".cd-name")) > 4.5
            for quiet in (".cd-state", ".cd-pace", ".cd-taught >> nth=0"):
                assert contrast(running.locator(quiet)) > 4.5, (palette, quiet)


def test_two_tabs_agree(bench: ComfyServer, page: Any) -> None:
    other = second_tab(page, bench)
    bench.run(train())
    for tab in (page, other):
        open_panel(tab)
        card(tab, "running")
    press(card(page, "running"), "Stop and save")
    bench.delete(f"{JOBS}/{card(other, 'stopped').get_attribute('data-job')}")
    for tab in (page, other):
        tab.get_by_text("No training yet").wait_for()


def test_it_can_be_used_with_the_keyboard_at_any_width_and_by_a_screen_reader(
    bench: ComfyServer, page: Any
) -> None:
    bench.run(train(preview_every_steps=4))
    page.locator("#graph-canvas").focus()
    page.keyboard.press("t")
    running = card(page, "running")
    until(page, lambda: running.locator(".cd-sample").count() > 0)
    chart = running.locator(".cd-chart svg")
    chart.focus()
    page.keyboard.press("Home")
    assert "loss at step 1:" in running.locator("figcaption").inner_text()
    page.keyboard.press("ArrowRight")
    assert "loss at step 2:" in running.locator("figcaption").inner_text()

    panel = page.locator(".cd-panel")
    for width in (220, 600):
        panel.evaluate("(panel, width) => { panel.style.width = `${width}px`; }", width)
        assert panel.evaluate("panel => panel.scrollWidth <= panel.clientWidth")
        screenshot(page, f"panel-{width}px")
    troubles = axe().run(page, context=".cd-panel").response["violations"]
    assert not [(trouble["id"], trouble["help"]) for trouble in troubles]

    running.get_by_role("button", name="Pause").focus()
    page.keyboard.press("Enter")
    card(page, "paused")


def test_two_trainings_are_compared(bench: ComfyServer, page: Any) -> None:
    kept = {"validation_pictures": 1, "validation_every_steps": 2, "preview_every_steps": 4}
    for name, rate in (("slow", 1e-4), ("fast", 1e-3), ("newest", 1e-3)):
        bench.run(train(name, steps=4, wait=True, learning_rate=rate, **kept))
    panel = open_panel(page)
    rivals = panel.locator(".cd-rivals")
    rivals.get_by_text("Compare two trainings").click()
    one, other = (
        rivals.get_by_role("combobox", name=label, exact=True)
        for label in ("One training", "The other training")
    )
    chosen = [box.evaluate("box => box.selectedOptions[0].label") for box in (one, other)]
    assert chosen == ["newest", "fast"]
    rivals.get_by_text("No setting differs").wait_for()
    other.select_option(label="slow")
    rate_row = rivals.get_by_role("row", name="learning_rate")
    rate_row.wait_for()
    assert rate_row.get_by_role("cell").all_inner_texts() == ["0.001", "0.0001"]
    assert rivals.get_by_text("No setting differs").count() == 0
    lowest = rivals.get_by_role("row", name="lowest validation").get_by_role("cell")
    until(page, lambda: all(" at step " in cell for cell in lowest.all_inner_texts()))
    for number, box in enumerate((one, other)):
        path = f"{JOBS}/{box.input_value()}/metrics"
        measured = bench.get(path)["validation"]
        step, loss = min(measured.items(), key=lambda item: item[1])
        figure, at = lowest.nth(number).inner_text().split(" at step ")
        assert (float(figure), at) == (pytest.approx(loss, rel=0.01), step)
    curves = rivals.locator(".cd-curve")
    drawn = [curve.get_attribute("d") for curve in curves.all()]
    assert len(set(drawn)) == 2 and all(drawn)
    assert rivals.locator(".cd-sample img").count() == 2
    for palette in ("dark", "light"):
        page.evaluate(f"app.extensionManager.setting.set('Comfy.ColorPalette', '{palette}')")
        for width in (220, 600):
            panel.evaluate("(panel, width) => { panel.style.width = `${width}px`; }", width)
            assert panel.evaluate("panel => panel.scrollWidth <= panel.clientWidth")
            rivals.scroll_into_view_if_needed()
            screenshot(page, f"panel-rivals-{palette}-{width}px")
        troubles = axe().run(page, context=".cd-panel").response["violations"]
        assert not [(trouble["id"], trouble["help"]) for trouble in troubles]
    page.evaluate("app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")


def test_a_part_of_the_chart_is_enlarged(bench: ComfyServer, page: Any) -> None:
    bench.run(train(steps=8))
    open_panel(page)
    finished = card(page, "finished")
    chart, caption = finished.locator(".cd-chart svg"), finished.locator("figcaption")
    until(page, lambda: "step 8" in caption.inner_text())
    whole = chart.locator(".cd-raw").get_attribute("d")
    box = chart.bounding_box()
    page.mouse.move(box["x"] + 0.55 * box["width"], box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + 20)
    page.mouse.up()
    chart.hover(position={"x": 1, "y": 20})
    assert "loss at step 5:" in caption.inner_text()
    assert chart.locator(".cd-raw").get_attribute("d") != whole
    chart.dblclick()
    chart.hover(position={"x": 1, "y": 20})
    assert "loss at step 1:" in caption.inner_text()
    assert chart.locator(".cd-raw").get_attribute("d") == whole


def test_files_of_other_tools_are_listed_and_the_list_is_filtered_by_base_model(
    bench: ComfyServer, page: Any
) -> None:
    folder = bench.models / "custom_diffusion"
    for path in folder.iterdir():  # of the tests before
        path.unlink()
    write_concept(made_concept({LAYER: (320, 768)}), folder / "cat.safetensors")
    export_concept(
        made_concept({LAYER.replace("1.1", "4.1"): (640, 2048)}, family="sdxl", rank=4),
        folder / "a-lora-with-a-name-that-is-longer-than-a-line.safetensors",
        "kohya-lora",
    )
    torch.save({"<toy>": torch.ones(768)}, folder / "toy.bin")
    panel = open_panel(page)
    library = panel.locator(".cd-library")
    library.locator("summary").first.click()
    items = library.get_by_role("listitem")
    until(page, lambda: items.count() == 3)
    assert "files: 3" in library.inner_text()
    lora, toy = items.filter(has_text="a-lora"), items.filter(has_text="toy.bin")
    told = lora.inner_text()
    assert "LoRA of another tool: Load Concept opens it" in told
    assert "Stable Diffusion XL, 0.0" in told and time.strftime("%Y") in told
    assert toy.locator("p").all_inner_texts()[:2] == [
        "< 0.01 MB",
        "file of another tool: Load Concept opens it",
    ]
    assert "of another tool" not in items.filter(has_text="cat.safetensors").inner_text()

    for palette in ("dark", "light"):
        in_palette(page, palette)
        for text in (".cd-name", ".cd-taught", ".cd-buttons button"):
            assert contrast(toy.locator(text).first) > 4.5, (palette, text)
        for width in (220, 600):
            panel.evaluate("(panel, width) => { panel.style.width = `${width}px`; }", width)
            assert panel.evaluate("panel => panel.scrollWidth <= panel.clientWidth")
            screenshot(page, f"panel-other-files-{palette}-{width}px")
        troubles = axe().run(page, context=".cd-panel").response["violations"]
        assert not [(trouble["id"], trouble["help"]) for trouble in troubles]
    in_palette(page, "dark")

    base = library.get_by_role("combobox", name="Base model")
    offered = base.get_by_role("option").all_inner_texts()
    assert offered == ["all models", "Stable Diffusion 1.x", "Stable Diffusion XL"]
    base.focus()
    page.keyboard.press("End")
    until(page, lambda: items.count() == 1)
    assert "a-lora" in items.inner_text()
    library.get_by_role("searchbox", name="Search names and words").fill("cat.")
    library.get_by_text("No concept matches").wait_for()
    base.focus()
    page.keyboard.press("Home")
    until(page, lambda: items.count() == 1)
    library.get_by_role("searchbox").fill("toy")
    until(page, lambda: items.count() == 1 and "toy.bin" in items.inner_text())
    press(items.first, "Add to graph")
    until(page, lambda: page.evaluate("app.graph._nodes.length") == 2)
    shown = page.locator(".cd-node .cd-concept")
    shown.get_by_text("file of another tool: Load Concept opens it").wait_for()


def axe() -> Any:
    return pytest.importorskip("axe_playwright_python.sync_playwright").Axe()


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
