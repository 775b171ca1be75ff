"""ComfyUI's page in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from .comfy_server import PACK_FOLDER, ComfyServer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
READY = """
window.app?.extensionManager?.workflow?.activeWorkflow?.isLoaded
    && !!window.LiteGraph?.registered_node_types?.ConceptMerge
"""
_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@contextmanager
def page_of(server: ComfyServer, troubles: list[str] | None = None) -> Iterator[Any]:
    """The page of a server, when its graph and the pack's nodes are there (a playwright Page).

    What the pack's own files throw or log as an error is added to `troubles`. Requests to other
    hosts are not let through; whose they were is not told.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("NO CHROMIUM: install it to run the tests in a browser")
    seen = [] if troubles is None else troubles
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.route(
            lambda url: not url.startswith(server.url),
            lambda route: route.abort("blockedbyclient"),
        )

        def thrown(error: Any) -> None:
            if PACK_FOLDER in (error.stack or ""):
                seen.append(error.stack)

        def logged(message: Any) -> None:
            if message.type == "error" and PACK_FOLDER in str(message.location):
                seen.append(f"{message.location}: {message.text}")

        page.on("pageerror", thrown)
        page.on("console", logged)
        page.goto(server.url)
        page.wait_for_function(READY, timeout=60_000)
        yield page
        browser.close()


def contrast(text: Any) -> float:
    """Of a text (a playwright Locator) with what is behind it, as WCAG 2 defines it: 1 to 21."""
    return text.evaluate(_CONTRAST)  # type: ignore[no-any-return]


_CONTRAST = """text => {
    const linear = c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) =>
        0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
    const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
    const context = canvas.getContext("2d");
    const rgba = color => {
        context.clearRect(0, 0, 1, 1);
        context.fillStyle = color;
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data];
    };
    let behind = text, background;
    do background = rgba(getComputedStyle(behind).backgroundColor);
    while (background[3] === 0 && (behind = behind.parentElement));
    const [a, b] = [rgba(getComputedStyle(text).color), background].map(luminance);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""
