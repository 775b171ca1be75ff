"""The panel beside its trainings: the saved concepts, putting them to use, and the first steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from custom_diffusion.concept.file import write_concept
from PIL import Image
from support.browser import LONG_MS, SharedPage, open_panel, press, screenshot, shared_page, until
from support.comfy_server import ComfyServer, ComfyServerError
from support.graphs import draw, draw_pictures, node, teach
from support.made_concepts import made_concept

CONCEPTS = "/custom_diffusion/concepts"
LAYER = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"


@pytest.fixture(scope="module")
def server_of_this_file(comfyui_path: Path, checkpoints: Path, base: Path) -> Iterator[ComfyServer]:
    draw_pictures(base / "input" / "cat")
    with ComfyServer(comfyui_path, base, checkpoints=[checkpoints / "sd15.safetensors"]) as running:
        yield running


@pytest.fixture
def bench(server_of_this_file: ComfyServer) -> ComfyServer:
    """The server with a cat that has a picture, and a mug that has none."""
    folder = server_of_this_file.models / "custom_diffusion"
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.unlink()
    write_concept(made_concept({LAYER: (320, 768)}), folder / "cat.safetensors")
    write_concept(made_concept({LAYER: (320, 768)}, "<new2>", "mug"), folder / "mug.safetensors")
    Image.new("RGB", (64, 64), "orange").save(folder / "cat.preview.png")
    return server_of_this_file


@pytest.fixture(scope="module")
def browser(server_of_this_file: ComfyServer) -> Iterator[SharedPage]:
    with shared_page(server_of_this_file) as shared:
        yield shared


@pytest.fixture
def page(bench: ComfyServer, browser: SharedPage) -> Iterator[Any]:
    with browser.anew() as page:
        yield page


def show(page: Any, graph: dict[str, Any]) -> None:
    page.evaluate("graph => app.loadApiJson(graph, 'test')", graph)
    page.wait_for_function(f"app.graph._nodes.length === {len(graph)}")


def opened_library(page: Any) -> Any:
    library = open_panel(page).locator(".cd-library")
    library.locator("summary").first.click()
    until(page, lambda: library.get_by_role("listitem").count() >= 2)
    return library


def widen(page: Any, width: int) -> None:
    """The sidebar, by its edge, until the panel is as wide as that or nearly."""
    panel = page.locator(".cd-panel")
    edge = page.locator(".p-splitter-gutter").first.bounding_box()
    page.mouse.move(edge["x"] + edge["width"] / 2, 500)
    page.mouse.down()
    page.mouse.move(panel.bounding_box()["x"] + width, 500, steps=5)
    page.mouse.up()
    assert panel.bounding_box()["width"] == pytest.approx(width, abs=12)


def item(library: Any, name: str) -> Any:
    return library.locator(f"li[data-name='{name}.safetensors']")


def select(page: Any, *classes: str) -> None:
    page.evaluate(
        """classes => app.canvas.selectItems(
            app.canvas.graph._nodes.filter(node => classes.includes(node.comfyClass))
        )""",
        classes,
    )


def prompt_of(page: Any) -> dict[str, Any]:
    return page.evaluate("app.graphToPrompt().then(made => made.output)")


def only(graph: dict[str, Any], class_type: str) -> tuple[str, dict[str, Any]]:
    ((key, made),) = ((k, m) for k, m in graph.items() if m["class_type"] == class_type)
    return key, made["inputs"]


def covered(page: Any) -> list[Any]:
    """Pairs of nodes that lie on each other."""
    return page.evaluate(
        """() => {
            const boxes = app.canvas.graph._nodes.map(node => [
                node.type, node.pos[0], node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT,
                node.pos[0] + node.size[0], node.pos[1] + node.size[1],
            ]);
            return boxes.flatMap((a, index) => boxes.slice(index + 1).filter(
                b => a[1] < b[3] && b[1] < a[3] && a[2] < b[4] && b[2] < a[4]
            ).map(b => [a[0], b[0]]));
        }"""
    )


def test_a_concept_is_renamed_and_deleted_over_http(bench: ComfyServer) -> None:
    folder = bench.models / "custom_diffusion"
    (folder / "animals").mkdir(exist_ok=True)
    (folder / "cat.safetensors").rename(folder / "animals" / "cat.safetensors")
    (folder / "cat.preview.png").rename(folder / "animals" / "cat.preview.png")
    before = (folder / "animals" / "cat.safetensors").read_bytes()

    renamed = bench.post(f"{CONCEPTS}/animals/cat.safetensors/rename", {"to": "../my cat?"})
    assert renamed["name"] == "animals/my-cat.safetensors"
    assert renamed["thumbnail"] is True
    assert (folder / "animals" / "my-cat.safetensors").read_bytes() == before
    with pytest.raises(ComfyServerError, match="already a mug") as refused:
        (folder / "animals" / "mug.safetensors").write_bytes(b"another's")
        bench.post(f"{CONCEPTS}/animals/my-cat.safetensors/rename", {"to": "mug"})
    assert refused.value.status == 409
    assert (folder / "animals" / "mug.safetensors").read_bytes() == b"another's"

    answer = bench.delete(f"{CONCEPTS}/animals/my-cat.safetensors")
    assert answer["bin"] == "animals/bin/my-cat.safetensors.deleted"
    assert (folder / answer["bin"]).read_bytes() == before
    assert (folder / "animals" / "bin" / "my-cat.preview.png.deleted").is_file()
    assert "my-cat" not in str(bench.get(CONCEPTS))
    # A second one of that name does not replace what is in the bin.
    (folder / "animals" / "my-cat.safetensors").write_bytes(b"the second")
    answer = bench.delete(f"{CONCEPTS}/animals/my-cat.safetensors")
    assert answer["bin"] == "animals/bin/my-cat-2.safetensors.deleted"
    assert (folder / "animals" / "bin" / "my-cat.safetensors.deleted").read_bytes() == before


@pytest.mark.parametrize(
    "name",
    [
        "gone.safetensors",
        "cat.preview.png",
        "../checkpoints/sd15.safetensors",
        "bin/cat.safetensors.deleted",
        "animals",
    ],
)
def test_nothing_but_the_files_of_the_list_can_be_moved(bench: ComfyServer, name: str) -> None:
    folder = bench.models / "custom_diffusion"
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "cat.safetensors.deleted").write_bytes(b"in the bin")
    before = sorted(bench.models.rglob("*"))
    path = f"{CONCEPTS}/{name.replace('/', '%2F')}"
    for ask in (lambda: bench.delete(path), lambda: bench.post(f"{path}/rename", {"to": "new"})):
        with pytest.raises(ComfyServerError) as refused:
            ask()
        assert refused.value.status == 404
    assert sorted(bench.models.rglob("*")) == before


def test_the_library_shows_a_grid_renames_and_deletes(bench: ComfyServer, page: Any) -> None:
    write_concept(
        made_concept({LAYER: (320, 768)}, "<new4>", "toy"),
        bench.models / "custom_diffusion" / "zoo" / "a-toy-with-a-long-name.safetensors",
    )
    show(page, {"load": node("LoadConcept", concept_name="cat.safetensors", rename_token="")})
    library = opened_library(page)
    panel = page.locator(".cd-panel")
    lefts = "list => new Set([...list.children].map(item => item.offsetLeft)).size"
    for width, columns in ((312, 1), (400, 2), (600, 3)):
        widen(page, width)
        until(page, lambda: library.locator("ul").evaluate(lefts) == columns)  # noqa: B023
        screenshot(page, f"library-{width}px")
        assert panel.evaluate("panel => panel.scrollWidth <= panel.clientWidth")
    # No rows that are wide and empty: a picture takes most of its box.
    box, picture = item(library, "cat"), item(library, "cat").locator("img")
    assert picture.bounding_box()["width"] > 0.8 * box.bounding_box()["width"]
    assert item(library, "mug").locator(".cd-nopicture").is_visible()
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    troubles = axe.run(page, context=".cd-panel").response["violations"]
    assert not [(one["id"], [node["html"] for node in one["nodes"]]) for one in troubles]

    press(item(library, "cat"), "Rename")
    dialog = page.get_by_role("dialog")
    dialog.locator("input").fill("my dog")
    dialog.locator("input").press("Enter")
    item(library, "my-dog").wait_for()
    (load,) = prompt_of(page).values()
    assert load["inputs"]["concept_name"] == "my-dog.safetensors"
    choices = "app.graph._nodes[0].widgets[0].options.values"
    toy = "zoo/a-toy-with-a-long-name.safetensors"
    assert page.evaluate(choices) == ["mug.safetensors", "my-dog.safetensors", toy]

    press(item(library, "mug"), "Delete")
    dialog.wait_for()
    screenshot(page, "library-delete")
    assert "mug.safetensors" in dialog.inner_text()
    dialog.get_by_role("button", name="Cancel").click()
    dialog.wait_for(state="detached")
    assert (bench.models / "custom_diffusion" / "mug.safetensors").is_file()
    press(item(library, "mug"), "Delete")
    dialog.get_by_role("button", name="Delete").click()
    item(library, "mug").wait_for(state="detached")
    library.get_by_text("mug.safetensors is now bin/mug.safetensors.deleted").wait_for()
    until(page, lambda: page.evaluate(choices) == ["my-dog.safetensors", toy])


def test_a_concept_is_wired_between_the_selected_loader_and_what_it_feeds(page: Any) -> None:
    show(page, {**draw("a cat"), **teach("cat", "cat", "cat", "<new1>")})
    library = opened_library(page)
    select(page, "CheckpointLoaderSimple")
    press(item(library, "cat"), "Add to graph")
    until(page, lambda: "ApplyKVDelta" in str(prompt_of(page)))
    graph = prompt_of(page)
    checkpoint, _ = only(graph, "CheckpointLoaderSimple")
    load, loaded = only(graph, "LoadConcept")
    apply, applied = only(graph, "ApplyKVDelta")
    _, sampler = only(graph, "KSampler")
    _, train = only(graph, "CustomDiffusionTrain")
    assert loaded["concept_name"] == "cat.safetensors"
    assert applied["concept"] == [load, 0]
    assert (applied["model"], applied["clip"]) == ([checkpoint, 0], [checkpoint, 1])
    assert sampler["model"] == [apply, 0]
    texts = [made["inputs"]["clip"] for made in graph.values() if "text" in made["inputs"]]
    assert texts == [[apply, 1]] * 2
    # A training goes on with the checkpoint itself.
    assert (train["model"], train["clip"]) == ([checkpoint, 0], [checkpoint, 1])
    assert covered(page) == []
    screenshot(page, "add-to-graph-wired")

    # A second one comes after the first, and one step undoes it.
    press(item(library, "mug"), "Add to graph")
    until(page, lambda: str(prompt_of(page)).count("ApplyKVDelta") == 2)
    graph = prompt_of(page)
    _, sampler = only(graph, "KSampler")
    second = graph[sampler["model"][0]]
    assert second["inputs"]["model"] == [apply, 0] == [second["inputs"]["clip"][0], 0]
    assert covered(page) == []
    page.evaluate("app.extensionManager.workflow.activeWorkflow.changeTracker.undo()")
    until(page, lambda: str(prompt_of(page)).count("ApplyKVDelta") == 1)
    _, sampler = only(prompt_of(page), "KSampler")
    assert sampler["model"] == [apply, 0]


def test_a_selected_load_concept_only_gets_another_file(page: Any) -> None:
    show(page, {"load": node("LoadConcept", concept_name="cat.safetensors", rename_token="")})
    library = opened_library(page)
    select(page, "LoadConcept")
    press(item(library, "mug"), "Add to graph")
    until(page, lambda: "mug.safetensors" in str(prompt_of(page)))
    assert len(prompt_of(page)) == 1
    page.locator(".cd-node .cd-concept").get_by_text("<new2> mug").wait_for()


def test_nodes_are_added_to_the_subgraph_that_is_on_screen_and_cover_none(page: Any) -> None:
    show(page, draw("a cat"))
    page.evaluate(
        """() => {
            const inside = app.graph._nodes.filter(node => node.comfyClass !== "SaveImage");
            app.graph.convertToSubgraph(new Set(inside));
            app.canvas.setGraph([...app.graph.subgraphs.values()][0]);
        }"""
    )
    library = opened_library(page)
    outside = page.evaluate("app.graph._nodes.length")
    inside = page.evaluate("app.canvas.graph._nodes.length")
    page.evaluate("app.canvas.deselectAll()")
    press(item(library, "cat"), "Add to graph")
    until(page, lambda: page.evaluate("app.canvas.graph._nodes.length") == inside + 2)
    assert page.evaluate("app.graph._nodes.length") == outside
    assert covered(page) == []
    screenshot(page, "add-to-graph-subgraph")
    select(page, "CheckpointLoaderSimple")
    press(item(library, "mug"), "Add to graph")
    until(page, lambda: page.evaluate("app.canvas.graph._nodes.length") == inside + 4)
    graph = prompt_of(page)
    _, sampler = only(graph, "KSampler")
    assert graph[sampler["model"][0]]["class_type"] == "ApplyKVDelta"
    assert covered(page) == []


def test_lists_of_concepts_hold_what_a_training_has_saved(bench: ComfyServer, page: Any) -> None:
    show(page, {"load": node("LoadConcept", concept_name="cat.safetensors", rename_token="")})
    bench.run(teach("fresh", "cat", "cat", "<new3>", steps=2))
    (bench.models / "custom_diffusion" / "fresh.safetensors").stat()
    choices = "app.graph._nodes[0].widgets[0].options.values"
    until(page, lambda: "fresh.safetensors" in page.evaluate(choices))
    assert page.evaluate("app.graph._nodes[0].widgets[0].value") == "cat.safetensors"
    (job,) = bench.get("/custom_diffusion/jobs")["jobs"]
    bench.delete(f"/custom_diffusion/jobs/{job['id']}")


def test_the_empty_panel_opens_the_first_template(page: Any) -> None:
    panel = open_panel(page)
    for width in (400, 600):
        widen(page, width)
        screenshot(page, f"panel-empty-{width}px")
    press(panel, "Open the first template")
    page.wait_for_function(
        "app.graph._nodes.some(node => node.comfyClass === 'CustomDiffusionTrain')",
        timeout=LONG_MS,
    )
    screenshot(page, "first-template")


def test_the_keyboard_goes_into_the_panel_with_the_key_that_opens_it(page: Any) -> None:
    page.locator("#graph-canvas").focus()
    page.keyboard.press("t")
    page.locator(".cd-panel").wait_for()
    inside = "!!document.activeElement.closest('.cd-panel')"
    until(page, lambda: page.evaluate(inside))
    page.keyboard.press("Tab")
    assert page.evaluate(f"{inside} && document.activeElement.matches('button, summary')")
    page.keyboard.press("t")
    page.locator(".cd-panel").wait_for(state="detached")
    assert page.evaluate("document.activeElement.id") == "graph-canvas"
