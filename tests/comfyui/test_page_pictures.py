"""Pictures that are dropped on the Concept node, or chosen there."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.browser import page_of, screenshot
from support.comfy_server import ComfyServer
from support.graphs import draw_pictures

CHOOSER = ".cd-pictures input[type=file]"


@pytest.fixture(scope="module")
def bench(comfyui_path: Path, base: Path) -> Iterator[ComfyServer]:
    draw_pictures(base / "input" / "cat")
    with ComfyServer(comfyui_path, base) as running:
        yield running


@pytest.fixture
def page(bench: ComfyServer) -> Iterator[Any]:
    troubles: list[str] = []
    with page_of(bench, troubles) as page:
        page.evaluate(
            """() => {
                app.graph.clear();
                const node = LiteGraph.createNode("CustomDiffusionConcept");
                app.graph.add(node);
                node.pos = [100, 100];
            }"""
        )
        page.locator(".cd-pictures").wait_for()
        yield page
    assert not troubles


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
