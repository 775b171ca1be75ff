"""What nodes show of their runs, where that survives, and where it is gone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from custom_diffusion.concept.file import write_concept
from support.browser import (
    LONG_MS,
    SharedPage,
    contrast,
    in_palette,
    press,
    screenshot,
    shared_page,
    until,
)
from support.comfy_server import ComfyServer
from support.graphs import draw_pictures, node, teach
from support.made_concepts import made_concept

JOBS = "/custom_diffusion/jobs"
LAYER = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
NO_ID = "00000000-0000-0000-0000-000000000000"


@pytest.fixture(scope="module")
def bench(comfyui_path: Path, checkpoints: Path, base: Path) -> Iterator[ComfyServer]:
    draw_pictures(base / "input" / "cat")
    folder = base / "models" / "custom_diffusion"
    folder.mkdir(parents=True)
    write_concept(made_concept({LAYER: (320, 768)}), folder / "cat.safetensors")
    write_concept(made_concept({LAYER: (320, 768)}, "<new2>", "mug"), folder / "mug.safetensors")
    (folder / "broken.safetensors").write_bytes(b"{}")
    with ComfyServer(comfyui_path, base, checkpoints=[checkpoints / "sd15.safetensors"]) as running:
        yield running


@pytest.fixture(scope="module")
def browser(bench: ComfyServer) -> Iterator[SharedPage]:
    with shared_page(bench) as shared:
        yield shared


@pytest.fixture
def page(bench: ComfyServer, browser: SharedPage) -> Iterator[Any]:
    with browser.anew("clipboard-read", "clipboard-write") as page:
        yield page


def show(page: Any, graph: dict[str, Any]) -> None:
    page.evaluate("graph => app.loadApiJson(graph, 'test')", graph)
    page.wait_for_function(f"app.graph._nodes.length === {len(graph)}")


def load_again(page: Any, workflow: dict[str, Any], name: str = "another") -> None:
    """As a workflow that is opened; another than the one that is open."""
    page.evaluate("([flow, name]) => app.loadGraphData(flow, true, true, name)", [workflow, name])


def run(page: Any) -> None:
    page.evaluate("void app.queuePrompt(0, 1)")


def inspected(name: str) -> dict[str, Any]:
    return {
        "load": node("LoadConcept", concept_name=f"{name}.safetensors", rename_token=""),
        "save": node("SaveConcept", concept=["load", 0], name="copy", precision="half (fp16)"),
    }


def undo(page: Any) -> None:
    page.evaluate("app.extensionManager.workflow.activeWorkflow.changeTracker.undo()")


def title_first_node(page: Any, title: str) -> None:
    """A change that can be undone."""
    page.evaluate(
        """title => {
            app.canvas.emitBeforeChange();
            app.graph._nodes[0].title = title;
            app.canvas.emitAfterChange();
        }""",
        title,
    )


def test_notes_survive_undo_tabs_and_a_reload_and_show_on_no_other_graph(page: Any) -> None:
    show(page, inspected("cat"))
    run(page)
    notes = page.locator(".cd-notes", has_text="copy")
    notes.wait_for(timeout=LONG_MS)
    run_workflow = page.evaluate("app.graph.serialize()")

    title_first_node(page, "other title")
    undo(page)
    page.wait_for_function("app.graph._nodes[0].title !== 'other title'")
    notes.wait_for()

    never_ran = {**run_workflow, "id": NO_ID}  # the same nodes with the same ids
    load_again(page, never_ran)
    page.wait_for_function(f"app.graph.id !== '{run_workflow['id']}'")
    assert not page.locator(".cd-notes").count()
    load_again(page, run_workflow, "back")
    notes.wait_for()
    # Nothing of it is in the workflow, where it would be a change.
    assert "copy.safetensors" not in str(page.evaluate("app.graph.serialize()"))

    page.reload()
    page.wait_for_function("window.app?.extensionManager?.workflow?.activeWorkflow?.isLoaded")
    page.wait_for_function("!!window.LiteGraph.registered_node_types.LoadConcept")
    load_again(page, run_workflow, "after the reload")
    notes.wait_for()


def test_what_a_prompt_has_to_tell_goes_to_its_own_workflow(page: Any) -> None:
    """Another one with the same ids of nodes is opened while it runs."""
    show(page, inspected("cat"))
    workflow = page.evaluate("app.graph.serialize()")
    page.evaluate(
        """async other => {
            await app.queuePrompt(0, 1);
            await app.loadGraphData(other, true, true, "other");
        }""",
        {**workflow, "id": NO_ID},
    )
    until(page, lambda: "SaveConcept" in page.evaluate("localStorage['custom_diffusion.runs']??''"))
    assert not page.locator(".cd-notes").count()
    load_again(page, workflow, "back")
    page.locator(".cd-notes", has_text="copy").wait_for()


@pytest.mark.parametrize("vue_nodes", [False, True])
def test_an_error_stands_on_the_node_that_raised_it(page: Any, vue_nodes: bool) -> None:
    page.evaluate(
        "vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)", vue_nodes
    )
    show(page, inspected("broken"))
    run(page)
    error = page.locator(".cd-error .cd-trouble")
    error.wait_for(timeout=LONG_MS)
    sentence = error.inner_text()
    assert "broken.safetensors is neither a .safetensors nor a PyTorch archive" in sentence
    assert "Traceback" not in sentence
    shown_on = page.evaluate(
        "app.graph._nodes.filter(n => n.widgets?.some(w => w.name === 'runs'))"
    )
    assert len(shown_on) == 1
    page.keyboard.press("Escape")
    press(page.locator(".cd-error"), "Copy")
    assert page.evaluate("navigator.clipboard.readText()") == sentence
    marked = error.evaluate(
        """text => {
            getSelection().selectAllChildren(text);
            return getComputedStyle(text).userSelect + " " + getSelection();
        }"""
    )
    assert marked == f"text {sentence}"
    for palette in ("dark", "light"):
        in_palette(page, palette)
        assert contrast(error) >= 4.5, palette
        screenshot(page, f"node-error-{palette}-{'vue' if vue_nodes else 'classic'}")
    in_palette(page, "dark")

    page.evaluate(
        """() => {
            const load = app.graph._nodes.find(node => node.comfyClass === "LoadConcept");
            load.widgets[0].value = "cat.safetensors";
        }"""
    )
    run(page)
    error.wait_for(state="detached", timeout=LONG_MS)  # the next run begins without it
    page.locator(".cd-notes", has_text="copy").wait_for(timeout=LONG_MS)
    page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def test_what_is_refused_before_anything_runs_stands_on_its_node_too(page: Any) -> None:
    show(page, inspected("gone"))
    run(page)
    error = page.locator(".cd-error .cd-trouble")
    error.wait_for(timeout=LONG_MS)
    assert "gone.safetensors" in error.inner_text()


def test_nodes_in_subgraphs_show_what_is_theirs(page: Any) -> None:
    """One subgraph, used twice: its node tells of each use under the name of that use."""
    show(
        page,
        {
            "cat": node("LoadConcept", concept_name="cat.safetensors", rename_token=""),
            "mug": node("LoadConcept", concept_name="mug.safetensors", rename_token=""),
            "inspect": node("InspectConcept", concept=["cat", 0]),
        },
    )
    page.evaluate(
        """() => {
            const loading = value => app.graph._nodes.find(
                node => node.widgets?.some(widget => widget.value === value)
            );
            const inspect = app.graph._nodes.find(node => node.comfyClass === "InspectConcept");
            const { node } = app.graph.convertToSubgraph(new Set([inspect]));
            node.title = "of the cat";
            const second = LiteGraph.createNode(node.type);
            app.graph.add(second);
            second.title = "of the mug";
            second.pos = [node.pos[0], node.pos[1] + 300];
            loading("mug.safetensors").connect(0, second, 0);
        }"""
    )
    run(page)
    until(
        page,
        lambda: page.evaluate("localStorage['custom_diffusion.runs'] ?? ''").count("notes") == 2,
    )
    page.evaluate("app.canvas.setGraph([...app.graph.subgraphs.values()][0])")
    places = page.locator(".cd-place:not(:empty)")
    until(page, lambda: places.count() == 2)
    for place, word in (("of the cat", "<new1> cat"), ("of the mug", "<new2> mug")):
        told = page.locator(".cd-runs > div", has_text=f"in {place}").inner_text()
        assert word in told, told
    assert "undefined" not in page.locator(".cd-runs").inner_text()
    screenshot(page, "node-subgraph")
    page.evaluate("app.canvas.setGraph(app.graph)")
    assert not page.locator(".cd-notes:visible").count()


def test_a_training_is_shown_after_undo_and_a_deleted_one_is_named(
    bench: ComfyServer, page: Any
) -> None:
    graph = teach("cat", "cat", "cat", "<new1>", wait=False, steps=10_000, preview_every_steps=4)
    show(page, graph)
    run(page)
    training = page.locator(".cd-training")
    training.wait_for(timeout=LONG_MS)
    until(page, lambda: training.locator(".cd-sample img").count() == 1)
    title_first_node(page, "other title")
    undo(page)
    page.wait_for_function("app.graph._nodes[0].title !== 'other title'")
    until(page, lambda: "learns" in training.inner_text())
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    workflow = page.evaluate("app.graph.serialize()")
    page.reload()
    page.wait_for_function("window.app?.extensionManager?.workflow?.activeWorkflow?.isLoaded")
    page.wait_for_function("!!window.LiteGraph.registered_node_types.CustomDiffusionTrain")
    load_again(page, workflow, "after the reload")
    until(page, lambda: "learns" in training.inner_text())
    (job,) = bench.get(JOBS)["jobs"]
    bench.post(f"{JOBS}/{job['id']}/stop")
    until(page, lambda: "stopped" in training.inner_text())

    # The same node begins another training, which has no sample yet.
    page.evaluate(
        """() => {
            const train = app.graph._nodes.find(node => node.comfyClass === "CustomDiffusionTrain");
            const set = (name, value) => {
                train.widgets.find(widget => widget.name === name).value = value;
            };
            set("seed", 5);
            set("preview_every_steps", 0);
        }"""
    )
    run(page)
    until(page, lambda: len(bench.get(JOBS)["jobs"]) == 2)
    until(page, lambda: "learns" in training.inner_text())
    assert not training.locator(".cd-sample").count()
    for job in bench.get(JOBS)["jobs"]:
        path = f"{JOBS}/{job['id']}"
        bench.post(f"{path}/stop")
        until(page, lambda: bench.get(path)["state"] == "stopped")  # noqa: B023
        bench.delete(path)
    training.get_by_text("This training was deleted.").wait_for()
    assert "undefined" not in page.locator("body").inner_text()
    assert not [url for url in asked if "undefined" in url or "null" in url]
