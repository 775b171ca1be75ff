"""ComfyUI's page in a real browser."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .comfy_server import PACK_FOLDER, SETTINGS, ComfyServer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
READY = """
window.app?.extensionManager?.workflow?.activeWorkflow?.isLoaded
    && !!window.LiteGraph?.registered_node_types?.ConceptMerge
"""
TAB = "custom-diffusion-trainings"
LONG_MS = 120_000
VIEWPORT = {"width": 1440, "height": 900}
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
        context = browser.new_context(viewport=VIEWPORT)
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


class SharedPage:
    """One page for a file of tests: loading it takes five seconds of a core, and putting away what
    the test before has left takes a tenth of one.
    """

    def __init__(self, page: Any, troubles: list[str]) -> None:
        self._page, self._troubles = page, troubles

    @contextmanager
    def anew(self, *permissions: str) -> Iterator[Any]:
        """The page (a playwright Page) with an empty graph, nothing else open, and ComfyUI's lists
        read again; at the end, what the pack's own files threw or logged fails the test.
        """
        page = self._page
        page.context.clear_permissions()
        page.context.grant_permissions(list(permissions))
        page.set_viewport_size(VIEWPORT)
        page.mouse.move(VIEWPORT["width"] / 2, VIEWPORT["height"] - 1)
        dialogs = page.locator("[role=dialog]:visible")
        while dialogs.count():
            page.keyboard.press("Escape")
            page.wait_for_timeout(50)
        page.evaluate(_PUT_AWAY, {**SETTINGS, **_OUR_SETTINGS})
        self._troubles.clear()
        yield page
        page.unroute_all(behavior="ignoreErrors")
        assert not self._troubles


@contextmanager
def shared_page(server: ComfyServer) -> Iterator[SharedPage]:
    """For a fixture of a module; each of its tests takes the page `anew`."""
    troubles: list[str] = []
    with page_of(server, troubles) as page:
        yield SharedPage(page, troubles)


_OUR_SETTINGS = {
    "CustomDiffusion.SoundWhenDone": False,
    "CustomDiffusion.ShareDevice": False,
    "CustomDiffusion.KeepBest": 1,
}
"""What tests change, beside ComfyUI's own."""
_PUT_AWAY = """async settings => {
    const { command, setting, sidebarTab, toast, workflow } = app.extensionManager;
    for (const menu of document.querySelectorAll(".litecontextmenu")) menu.remove();
    for (const part of document.querySelectorAll(".cd-panel details[open]")) part.open = false;
    for (const box of document.querySelectorAll(".cd-panel input, .cd-panel select")) {
        if (box.matches("select")) box.selectedIndex = 0;
        else box.value = "";
        for (const kind of ["input", "change"]) box.dispatchEvent(new Event(kind, {bubbles: true}));
    }
    document.querySelector(".cd-panel")?.removeAttribute("style");
    const shown = sidebarTab.activeSidebarTab?.id;
    if (shown) await command.execute(`Workspace.ToggleSidebarTab.${shown}`);
    toast.removeAll?.();
    document.activeElement.blur();
    for (const [name, value] of Object.entries(settings)) {
        if (setting.get(name) !== value) await setting.set(name, value);
    }
    localStorage.clear();
    sessionStorage.clear();
    const before = [...workflow.openWorkflows];
    await command.execute("Comfy.NewBlankWorkflow");
    for (const one of before) await workflow.closeWorkflow(one);
    app.canvas.setGraph(app.graph);
    app.graph.clear();
    app.canvas.ds.reset();
    await (app.reloadNodeDefs?.() ?? app.refreshComboInNodes());
    toast.removeAll?.();
}"""


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


def in_palette(page: Any, name: str) -> None:
    """Changes ComfyUI's colours to `dark` or `light`; returns when nothing changes any more."""
    page.evaluate(_IN_PALETTE, name)


_IN_PALETTE = """async name => {
    await app.extensionManager.setting.set("Comfy.ColorPalette", name);
    const frame = () => new Promise(requestAnimationFrame);
    const dark = () => Boolean(document.querySelector("html.dark-theme, body.dark-theme"));
    for (let frames = 0; dark() !== (name === "dark") && frames < 200; frames++) await frame();
    for (let frames = 0; frames < 3; frames++) await frame();
    const ends = animation => animation.effect.getComputedTiming().endTime < 1000;
    const moving = document.getAnimations().filter(ends).map(({finished}) => finished);
    await Promise.race([Promise.allSettled(moving), new Promise(end => setTimeout(end, 1000))]);
    await frame();
}"""


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
