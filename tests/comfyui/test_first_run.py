"""The first minutes of somebody who has ComfyUI, one checkpoint, and some pictures; and how the
nodes look that they see then, on the canvas and of HTML.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import (
    LONG_MS,
    TAB,
    SharedPage,
    in_palette,
    open_panel,
    press,
    screenshot,
    shared_page,
    until,
)
from support.comfy_server import ComfyServer
from support.graphs import draw_pictures

OLD = Path(__file__).parents[1] / "support" / "workflow_0_1_0.json"
"""`learn_one_concept` as version 0.1.0 had it"""
RENDERERS = pytest.mark.parametrize("vue_nodes", [False, True], ids=["classic", "vue"])
TRAIN = "app.graph._nodes.find(node => node.comfyClass === 'CustomDiffusionTrain')"
NODES = """() => {
    app.graph.clear();
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [0, 0];
    let [x, y, row] = [60, 100, 0];
    const ours = Object.entries(LiteGraph.registered_node_types)
        .filter(([, type]) => type.category === "custom diffusion");
    for (const [name] of ours) {
        const node = LiteGraph.createNode(name);
        app.graph.add(node);
        if (x + node.size[0] > 2300) [x, y, row] = [60, y + row + 100, 0];
        node.pos = [x, y];
        x += node.size[0] + 40;
        row = Math.max(row, node.size[1]);
    }
    return ours.length;
}"""
CUT = """unfolded => {
    const texts = new Set();
    const fill = CanvasRenderingContext2D.prototype.fillText;
    CanvasRenderingContext2D.prototype.fillText = function (text, ...place) {
        texts.add(text);
        return fill.call(this, text, ...place);
    };
    for (const node of app.graph._nodes) {
        node.showAdvanced = unfolded;
        node.setSize([node.size[0], node.computeSize()[1]]);
    }
    app.canvas.draw(true, true);
    CanvasRenderingContext2D.prototype.fillText = fill;
    return [...texts].filter(text => /(…|\\.\\.\\.)$/.test(text));
}"""
CUT_HTML = """() => [...document.querySelectorAll("[data-node-id] *")]
    .filter(each => !each.childElementCount && each.textContent.trim())
    .filter(each => getComputedStyle(each).overflow !== "visible")
    .filter(each => each.scrollWidth > each.clientWidth + 1)
    .map(each => each.textContent.trim())
"""


@pytest.fixture(scope="module")
def bench(comfyui_path: Path, checkpoints: Path, base: Path) -> Iterator[ComfyServer]:
    draw_pictures(base / "photographs", count=1)
    server = ComfyServer(comfyui_path, base, checkpoints=[checkpoints / "sd15.safetensors"])
    with server:
        yield server


@pytest.fixture(scope="module")
def browser(bench: ComfyServer) -> Iterator[SharedPage]:
    with shared_page(bench) as shared:
        yield shared


@pytest.fixture
def page(bench: ComfyServer, browser: SharedPage) -> Iterator[Any]:
    with browser.anew() as page:
        yield page


@pytest.fixture
def nodes(page: Any, vue_nodes: bool) -> Any:
    """The page with one of each node."""
    setting = "vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)"
    page.evaluate(setting, vue_nodes)
    page.set_viewport_size({"width": 2400, "height": 1800})
    assert page.evaluate(NODES) == page.evaluate("app.graph._nodes.length") > 15
    page.wait_for_timeout(1000)  # nodes of HTML come with the next frames
    yield page
    page.evaluate(setting, False)


def test_four_clicks_lead_to_a_training(page: Any, bench: ComfyServer) -> None:
    page.evaluate(
        """() => {
            window.clicks = 0;
            addEventListener("click", event => (window.clicks += event.isTrusted), true);
        }"""
    )
    page.locator(f".{TAB}-tab-button, [data-testid={TAB}-tab-button]").first.click()
    press(page.locator(".cd-panel"), "Open the first template")
    choose = page.get_by_role("button", name="Choose pictures …")
    choose.wait_for(timeout=LONG_MS)
    assert not page.locator("[role=dialog]:visible").count()
    with page.expect_file_chooser() as chooser:
        choose.click()
    chooser.value.set_files([str(path) for path in (bench.base / "photographs").iterdir()])
    page.locator(".cd-pictures img").wait_for()
    screenshot(page, "first-run-pictures")
    page.get_by_role("button", name="Run", exact=True).first.click()
    said = page.get_by_text("Method custom diffusion, resolution 512, 250 steps: the checkpoint is")
    said.wait_for(timeout=LONG_MS)
    screenshot(page, "first-run-training")
    assert page.evaluate("window.clicks") == 4
    assert [path.name for path in (bench.input / "cat").iterdir()] == ["0.png"]
    bench.interrupt()
    until(page, lambda: not bench.get("/queue")["queue_running"])


def test_templates_are_found_by_what_people_look_for(page: Any) -> None:
    page.evaluate("void app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    search = page.locator("[role=dialog] input").first
    search.wait_for(timeout=LONG_MS)
    first = page.get_by_text("1 Teach a concept - train a LoRA").first
    for words in ("teach a concept", "lora", "train a lora"):
        search.fill(words)
        first.wait_for(timeout=LONG_MS)
    screenshot(page, "templates-searched")


def test_a_graph_of_the_first_version_keeps_its_values(page: Any) -> None:
    prompt = page.evaluate(
        """async workflow => {
            await app.loadGraphData(workflow);
            return (await app.graphToPrompt()).output;
        }""",
        json.loads(OLD.read_text(encoding="utf-8")),
    )
    (train,) = (one for one in prompt.values() if one["class_type"] == "CustomDiffusionTrain")
    expected = {
        **{"name": "my-cat", "method": "custom diffusion", "method.steps": 250, "batch_size": 8},
        **{"method.learning_rate": 8e-5, "resolution": 512, "seed": 0, "wait": True, "fit": "crop"},
        **{"augment": True, "flip": True, "prior_weight": 1, "gradient_cut": "own words"},
        **{"micro_batch_size": 0, "gradient_checkpointing": False, "preview_every_steps": 50},
        **{"checkpoint_every_steps": 50, "share_device": False, "keep_on_interrupt": False},
    }
    assert {name: train["inputs"][name] for name in expected} == expected
    (views,) = (one for one in prompt.values() if one["class_type"] == "CustomDiffusionViews")
    assert views["inputs"]["resolution"] == 512


def test_new_train_nodes_follow_the_model(page: Any) -> None:
    values = page.evaluate(
        """() => {
            const node = LiteGraph.createNode("CustomDiffusionTrain");
            return Object.fromEntries(node.widgets.map(widget => [widget.name, widget.value]));
        }"""
    )
    assert (values["method"], values["method.steps"], values["resolution"]) == ("automatic", 0, 0)


@RENDERERS
def test_no_text_of_a_node_is_cut(nodes: Any, vue_nodes: bool) -> None:
    cut = CUT_HTML if vue_nodes else CUT
    name = "vue" if vue_nodes else "classic"
    for unfolded in (False, True):
        found = nodes.evaluate(CUT, unfolded)
        nodes.wait_for_timeout(500)
        assert (nodes.evaluate(CUT_HTML) if vue_nodes else found) == []
        screenshot(nodes, f"nodes-{name}{'-unfolded' if unfolded else ''}")
    nodes.evaluate(f"{TRAIN}.setSize([140, {TRAIN}.size[1]])")
    nodes.wait_for_timeout(500)
    assert nodes.evaluate(cut, *([] if vue_nodes else [True]))  # else this would find nothing ever


@RENDERERS
def test_what_is_advanced_is_folded(nodes: Any, vue_nodes: bool) -> None:
    folded = nodes.evaluate(f"[...{TRAIN}.computeSize()]")
    if vue_nodes:
        node = nodes.locator("[data-node-id]", has_text="Custom Diffusion Train").first
        assert not node.get_by_text("gradient_cut").count()
        node.get_by_text("Show advanced inputs").click()
        node.get_by_text("gradient_cut").wait_for()
        return
    visible = f"{TRAIN}.widgets.filter(one => !one.hidden).map(one => one.name)"
    assert "gradient_cut" not in nodes.evaluate(visible)
    nodes.evaluate(f"{TRAIN}.widgets.find(one => one.name === 'advanced').callback()")
    assert "gradient_cut" in nodes.evaluate(visible)
    assert nodes.evaluate(f"{TRAIN}.size[1]") > folded[1] + 200
    prompt = nodes.evaluate("app.graphToPrompt().then(all => Object.values(all.output))")
    (inputs,) = (one["inputs"] for one in prompt if one["class_type"] == "CustomDiffusionTrain")
    assert "advanced" not in inputs and inputs["gradient_cut"] == "own words"
    kept = nodes.evaluate(f"{TRAIN}.serialize().widgets_values")
    assert not any("dvanced" in str(value) for value in kept)


@RENDERERS
def test_sockets_have_colours_in_every_palette(nodes: Any, vue_nodes: bool) -> None:
    types = ("CONCEPT", "TRAINING_CONCEPT", "REGULARIZATION_SET", "CONCEPT_REGION")
    for palette in ("light", "dark"):
        in_palette(nodes, palette)
        canvas = nodes.evaluate(
            "types => types.map(type => app.canvas.default_connection_color_byType[type])", types
        )
        links = nodes.evaluate(
            "types => types.map(type => LGraphCanvas.link_type_colors[type])", types
        )
        html = nodes.evaluate(
            """types => types.map(type =>
                getComputedStyle(document.documentElement).getPropertyValue(`--color-datatype-${type}`))""",
            types,
        )
        assert canvas == links == [colour.strip() for colour in html]
        assert len(set(canvas)) == len(types)


@RENDERERS
def test_a_link_that_is_dropped_offers_to_apply_the_concept_first(
    page: Any, vue_nodes: bool
) -> None:
    page.evaluate(
        """vue => {
            app.extensionManager.setting.set("Comfy.VueNodes.Enabled", vue);
            app.extensionManager.setting.set("Comfy.LinkRelease.Action", "context menu");
            app.graph.clear();
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [0, 0];
            const node = LiteGraph.createNode("LoadConcept");
            app.graph.add(node);
            node.pos = [300, 300];
            app.canvas.draw(true, true);
        }""",
        vue_nodes,
    )
    page.wait_for_timeout(1000)
    x, y = page.evaluate("app.canvasPosToClientPos(app.graph._nodes[0].getConnectionPos(false, 0))")
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 100, y + 50, steps=4)
    page.mouse.move(x + 300, y + 100, steps=4)
    page.mouse.up()
    menu = page.locator(".litecontextmenu .litemenu-entry")
    menu.first.wait_for()
    screenshot(page, f"dropped-link-{'vue' if vue_nodes else 'classic'}")
    offered = [text for text in menu.all_inner_texts() if text.strip()]
    assert offered[offered.index("Reroute") + 1] == "ApplyKVDelta"
    page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def test_the_empty_panel_is_there_to_begin_with(page: Any) -> None:
    panel = open_panel(page)
    assert panel.get_by_role("button", name="Open the first template").is_visible()
