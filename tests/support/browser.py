"""ComfyUI's page in a real browser."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .comfy_server import PACK_FOLDER, ComfyServer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
READY = """
window.app?.extensionManager?.workflow?.activeWorkflow?.isLoaded
    && !!window.LiteGraph?.registered_node_types?.ConceptMerge
"""
TAB = "custom-diffusion-trainings"
LONG_MS = 120_000
SCREENSHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"
_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@contextmanager
def page_of(server: ComfyServer, troubles: list[str] | None = None) -> Iterator[Any]:
    """The page of a server, when its graph and the pack's nodes are there (a playwright Page).

    What the pack's own files throw, log as an error or ask of another host is added to `troubles`.
    Requests to other hosts are not let through.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("NO CHROMIUM: install it to run the tests in a browser")
    seen = [] if troubles is None else troubles
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        page = context.new_page()
        context.route(
            lambda url: not url.startswith(server.url),
            lambda route: route.abort("blockedbyclient"),
        )

        def thrown(error: Any) -> None:
            if PACK_FOLDER in (error.stack or ""):
                seen.append(error.stack)

        def logged(message: Any) -> None:
            if message.type == "error" and PACK_FOLDER in str(message.location):
                seen.append(f"{message.location}: {message.text}")

        def asked(request: dict[str, Any]) -> None:
            url = request["request"]["url"]
            if PACK_FOLDER in str(request["initiator"]) and not url.startswith(server.url):
                seen.append(f"a request to {url}")

        page.on("pageerror", thrown)
        page.on("console", logged)
        network = context.new_cdp_session(page)
        network.on("Network.requestWillBeSent", asked)
        network.send("Network.enable")
        _load(page, server)
        yield page
        browser.close()


def second_tab(page: Any, server: ComfyServer) -> Any:
    """Of the same browser."""
    tab = page.context.new_page()
    _load(tab, server)
    return tab


def _load(page: Any, server: ComfyServer) -> None:
    page.goto(server.url)
    page.wait_for_function(READY, timeout=60_000)


def open_panel(page: Any) -> Any:
    page.evaluate(f"void app.extensionManager.command.execute('Workspace.ToggleSidebarTab.{TAB}')")
    panel = page.locator(".cd-panel")
    panel.wait_for()
    return panel


def card(page: Any, state: str) -> Any:
    """The card of the only job, when it is in that state, opened."""
    found = page.locator(f".cd-job[data-state={state}]")
    found.wait_for(timeout=LONG_MS)
    if found.get_attribute("open") is None:
        found.locator("summary").first.click()
    return found


def press(where: Any, label: str) -> None:
    where.get_by_role("button", name=label, exact=True).click()


def until(page: Any, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG_MS / 1000
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        page.wait_for_timeout(50)


def screenshot(page: Any, name: str) -> None:
    """To be looked at, in build/screenshots."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


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
