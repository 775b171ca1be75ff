"""Pictures that are dropped on the Concept node, or chosen there."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.browser import SharedPage, screenshot, shared_page
from support.comfy_server import ComfyPromptError, ComfyServer
from support.graphs import draw_pictures, node

CHOOSER = ".cd-pictures input[type=file]"


@pytest.fixture(scope="module")
def bench(comfyui_path: Path, base: Path) -> Iterator[ComfyServer]:
    draw_pictures(base / "input" / "cat")
    draw_pictures(base / "input" / "2024" / "summer" / "dog", count=2)
    draw_pictures(base / "datasets" / "birds" / "wren", count=4)
    with ComfyServer(comfyui_path, base) as running:
        yield running


@pytest.fixture(scope="module")
def browser(bench: ComfyServer) -> Iterator[SharedPage]:
    with shared_page(bench) as shared:
        yield shared


@pytest.fixture
def page(browser: SharedPage) -> Iterator[Any]:
    with browser.anew() as page:
        page.evaluate(
            """() => {
                const node = LiteGraph.createNode("CustomDiffusionConcept");
                app.graph.add(node);
                node.pos = [100, 100];
            }"""
        )
        page.locator(".cd-pictures").wait_for()
        yield page


def picture(colour: str) -> bytes:
    file = BytesIO()
    Image.new("RGB", (96, 96), colour).save(file, "PNG")
    return file.getvalue()


def choose(page: Any, **files: bytes) -> None:
    kinds = {"png": "image/png", "txt": "text/plain", "pdf": "application/pdf"}
    page.set_input_files(
        CHOOSER,
        [
            {
                "name": name.replace("_", "."),
                "mimeType": kinds[name.rpartition("_")[2]],
                "buffer": data,
            }
            for name, data in files.items()
        ],
    )


def folder_of(page: Any) -> str:
    value: str = page.evaluate(
        "app.graph._nodes[0].widgets.find(widget => widget.name === 'folder').value"
    )
    return value


def test_chosen_pictures_go_into_a_folder_of_their_own(page: Any, bench: ComfyServer) -> None:
    """A folder with the noun's name is there already, and stays as it is."""
    before = sorted(path.name for path in (bench.base / "input" / "cat").iterdir())
    colours = {f"{colour}_png": picture(colour) for colour in ("red", "green")}
    choose(page, **colours, red_txt=b"photo of a <new1> cat", leaflet_pdf=b"%PDF")
    page.wait_for_function("app.graph._nodes[0].widgets.some(widget => widget.value === 'cat-2')")
    folder = bench.base / "input" / "cat-2"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "red.png": picture("red"),
        "green.png": picture("green"),
        "red.txt": b"photo of a <new1> cat",
    }
    assert sorted(path.name for path in (bench.base / "input" / "cat").iterdir()) == before
    told = page.locator(".cd-pictures [role=status]").inner_text()
    assert "In the folder “cat-2” of ComfyUI's input: 3 more files." in told
    assert "Left out, neither picture nor caption: 1." in told
    page.wait_for_function(
        "[...document.querySelectorAll('.cd-pictures img')].filter(one => one.naturalWidth)"
        ".length === 2"
    )
    screenshot(page, "concept_pictures")

    choose(page, blue_png=picture("blue"))
    page.wait_for_function("document.querySelectorAll('.cd-pictures img').length === 3")
    assert folder_of(page) == "cat-2" and (folder / "blue.png").is_file()


def folders(bench: ComfyServer) -> list[str]:
    info = bench.object_info("CustomDiffusionConcept")
    options: list[str] = info["input"]["required"]["folder"][1]["options"]
    return options


def take(page: Any, folder: str) -> None:
    page.evaluate(
        """name => {
            const folder = app.graph._nodes[0].widgets.find(widget => widget.name === "folder");
            folder.value = name;
            folder.callback(name);
        }""",
        folder,
    )


def shown(page: Any, count: int) -> list[str]:
    """Names of the pictures on the node, when there are so many and all can be seen."""
    page.wait_for_function(
        """count => {
            const all = [...document.querySelectorAll(".cd-pictures img")];
            return all.length === count && all.every(one => one.naturalWidth);
        }""",
        arg=count,
    )
    return page.eval_on_selector_all(".cd-pictures img", "all => all.map(one => one.alt)")


def test_a_picture_is_taken_out_with_its_caption_and_mask(page: Any, bench: ComfyServer) -> None:
    folder = bench.input / "cat-here"
    draw_pictures(folder)
    (folder / "1.txt").write_text("photo of a <new1> cat", encoding="utf-8")
    Image.new("L", (80, 96), 255).save(folder / "1.mask.png")
    take(page, "cat-here")
    assert shown(page, 3) == ["0.png", "1.png", "2.png"]
    page.get_by_role("button", name="Take out 1.png").click()
    assert shown(page, 2) == ["0.png", "2.png"]
    assert sorted(path.name for path in folder.iterdir()) == [".deleted", "0.png", "2.png"]
    assert sorted(path.name for path in (folder / ".deleted").iterdir()) == [
        *("1.mask.png.deleted", "1.png.deleted", "1.txt.deleted")
    ]
    told = page.locator(".cd-pictures [role=status]").inner_text()
    assert told == "1.png is now cat-here/.deleted/1.png.deleted"
    assert not any("deleted" in name for name in folders(bench))


@pytest.mark.parametrize("vue_nodes", [False, True])
def test_pictures_are_taken_out_with_the_keyboard(
    page: Any, bench: ComfyServer, vue_nodes: bool
) -> None:
    page.evaluate(
        "vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)", vue_nodes
    )
    name = f"keys-{vue_nodes}"
    draw_pictures(bench.input / name)
    take(page, name)
    shown(page, 3)
    page.get_by_role("button", name="Choose pictures …").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.title") == "Take out 1.png"
    screenshot(page, f"concept_take_out_{'vue' if vue_nodes else 'classic'}")
    page.keyboard.press("Enter")
    assert shown(page, 2) == ["0.png", "2.png"]
    assert page.evaluate("document.activeElement.title") == "Take out 2.png"
    page.keyboard.press("Enter")
    shown(page, 1)
    page.keyboard.press("Enter")
    shown(page, 0)
    assert page.evaluate("document.activeElement.textContent").strip() == "Choose pictures …"
    page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def test_folders_of_any_depth_and_data_sets_are_shown(page: Any, bench: ComfyServer) -> None:
    take(page, "2024/summer/dog")
    assert shown(page, 2) == ["0.png", "1.png"]
    if "birds/wren [datasets]" not in folders(bench):
        assert bench.get("/system_stats")["system"]["comfyui_version"] < "0.30"
        return
    take(page, "birds/wren [datasets]")
    assert len(shown(page, 4)) == 4
    graph = {"data": node("CustomDiffusionConcept", **concept("birds/wren [datasets]"))}
    graph["views"] = node("CustomDiffusionViews", concept=["data", 0], **VIEWS)
    (sheet,) = bench.images(bench.run(graph), "views")
    assert sheet.std() > 1
    assert "nothing [datasets]" not in folders(bench)
    with pytest.raises(ComfyPromptError, match="no folder 'nothing .datasets.'"):
        bench.run(
            {**graph, "data": node("CustomDiffusionConcept", **concept("nothing [datasets]"))}
        )


def concept(folder: str, **changes: Any) -> dict[str, Any]:
    plain = {"class_noun": "cat", "modifier_token": "<new1>", "regularization_folder": "none"}
    return {"folder": folder, **plain, "initializer": "", "kind": "thing", **changes}


VIEWS = {"resolution": 64, "seed": 0, "augment": False, "flip": False, "fit": "crop"}


@pytest.mark.parametrize(
    ("folder", "changes", "message"),
    [
        ("none", {}, "There are no pictures yet. Press 'Choose pictures'"),
        ("cats", {}, "There is no folder "),
        ("../cat", {}, "is outside ComfyUI's input folder"),
        ("empty", {}, "holds no pictures"),
        ("cat", {"modifier_token": "new1"}, "'<new1>', for example"),
        ("cat", {"class_noun": " "}, "The class noun is empty"),
        ("cat", {"regularization_folder": "cats"}, "There is no folder "),
        ("cat", {"regularization_folder": "cat"}, "choose another folder for them, or none"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    bench: ComfyServer, folder: str, changes: dict[str, Any], message: str
) -> None:
    (bench.input / "empty").mkdir(exist_ok=True)
    graph = {"data": node("CustomDiffusionConcept", **concept(folder, **changes))}
    graph["views"] = node("CustomDiffusionViews", concept=["data", 0], **VIEWS)
    with pytest.raises(ComfyPromptError) as refused:
        bench.queue(graph)
    assert refused.value.node_errors["data"]["class_type"] == "CustomDiffusionConcept"
    assert message in str(refused.value)


def test_a_refusal_stands_on_the_node_once(page: Any) -> None:
    page.evaluate(
        """() => {
            const views = LiteGraph.createNode("CustomDiffusionViews");
            app.graph.add(views);
            app.graph._nodes[0].connect(0, views, 0);
            void app.queuePrompt(0, 1);
        }"""
    )
    error = page.locator(".cd-error .cd-trouble")
    error.wait_for()
    assert error.inner_text().count("There are no pictures yet") == 1
    assert error.inner_text().endswith("or connect images.")
    screenshot(page, "concept_refused")


def test_what_another_node_gives_is_not_judged_before(bench: ComfyServer) -> None:
    graph = {
        "noun": node("PrimitiveString", value="cat"),
        "data": node("CustomDiffusionConcept", **concept("cat", class_noun=["noun", 0])),
    }
    graph["views"] = node("CustomDiffusionViews", concept=["data", 0], **VIEWS)
    assert bench.run(graph)["outputs"]["views"]["images"]


def test_dropped_pictures_too(page: Any, bench: ComfyServer) -> None:
    taken = page.evaluate(
        """async data => {
            const node = app.graph._nodes[0];
            node.widgets.find(widget => widget.name === "class_noun").value = "../mug";
            const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], "one.png", {type: "image/png"}));
            return node.onDragOver({dataTransfer}) && node.onDragDrop({dataTransfer});
        }""",
        base64.b64encode(picture("pink")).decode(),
    )
    assert taken
    page.wait_for_function("app.graph._nodes[0].widgets.some(widget => widget.value === 'mug')")
    assert (bench.base / "input" / "mug" / "one.png").read_bytes() == picture("pink")


def test_what_cannot_be_uploaded_is_named(page: Any) -> None:
    page.route("**/upload/image", lambda route: route.fulfill(status=507))
    choose(page, red_png=picture("red"))
    page.wait_for_function(
        "document.querySelector('.cd-pictures [role=status]').textContent.includes('507')"
    )
    assert "red.png could not be uploaded" in page.locator(".cd-pictures").inner_text()
