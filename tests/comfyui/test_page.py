"""What the pack adds to nodes, text boxes and settings of ComfyUI's page, beside the panel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from custom_diffusion.concept.file import write_concept
from PIL import Image
from support.browser import (
    LONG_MS,
    SharedPage,
    card,
    contrast,
    in_palette,
    open_panel,
    press,
    screenshot,
    shared_page,
    until,
)
from support.comfy_server import PACK_FOLDER, ComfyServer, ComfyServerError
from support.graphs import draw, draw_pictures, merge, node, teach
from support.made_concepts import made_concept

JOBS = "/custom_diffusion/jobs"
CONCEPTS = "/custom_diffusion/concepts"
LAYER = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"


@pytest.fixture(scope="module")
def bench(comfyui_path: Path, checkpoints: Path, base: Path) -> Iterator[ComfyServer]:
    draw_pictures(base / "input" / "cat")
    (base / "input" / "captions.txt").write_text(
        "\n".join(f"photo of a dog {n}" for n in range(30))
    )
    folder = base / "models" / "custom_diffusion"
    folder.mkdir(parents=True)
    write_concept(made_concept({LAYER: (320, 768)}), folder / "cat.safetensors")
    write_concept(made_concept({LAYER: (320, 768)}, "<new2>", "mug"), folder / "mug.safetensors")
    (folder / "broken.safetensors").write_bytes(b"{}")
    Image.new("RGB", (64, 64), "orange").save(folder / "cat.preview.png")
    paths = base / "paths.yaml"
    paths.write_text(f"somewhere:\n  custom_diffusion_jobs: {base / 'elsewhere'}\n")
    with ComfyServer(
        comfyui_path,
        base,
        checkpoints=[checkpoints / "sd15.safetensors"],
        arguments=["--extra-model-paths-config", str(paths)],
    ) as running:
        yield running


@pytest.fixture(scope="module")
def browser(bench: ComfyServer) -> Iterator[SharedPage]:
    with shared_page(bench) as shared:
        yield shared


@pytest.fixture
def page(bench: ComfyServer, browser: SharedPage) -> Iterator[Any]:
    with browser.anew() as page:
        yield page


_WITHIN_NODE = """frame => {
    const tall = Math.min(frame.firstElementChild.offsetHeight, 300);
    return frame.clientHeight >= tall;
}"""


def show(page: Any, graph: dict[str, Any]) -> None:
    """Opens a graph in the page."""
    page.evaluate("graph => app.loadApiJson(graph, 'test')", graph)
    page.wait_for_function(f"app.graph._nodes.length === {len(graph)}")


def run(page: Any) -> None:
    page.evaluate("void app.queuePrompt(0, 1)")


def load(name: str) -> dict[str, Any]:
    return node("LoadConcept", concept_name=f"{name}.safetensors", rename_token="")


def test_a_concept_can_be_looked_up_and_what_is_none_is_said(bench: ComfyServer) -> None:
    listing = bench.get(CONCEPTS)
    assert [card["name"] for card in listing["concepts"]] == ["cat.safetensors", "mug.safetensors"]
    assert "broken.safetensors" in listing["unreadable"]
    assert bench.get(f"{CONCEPTS}/cat.safetensors")["prompts"] == ["<new1> cat"]
    outside = "..%2F..%2Fmodels%2Fcheckpoints%2Fsd15.safetensors"
    for path in ("gone.safetensors", outside, f"{outside}/thumbnail", "mug.safetensors/thumbnail"):
        with pytest.raises(ComfyServerError) as refused:
            bench.get(f"{CONCEPTS}/{path}")
        assert refused.value.status == 404


def test_concepts_are_searched_sorted_and_inspected_over_http(bench: ComfyServer) -> None:
    def names(query: str) -> list[str]:
        return [card["name"] for card in bench.get(f"{CONCEPTS}?{query}")["concepts"]]

    assert names("search=MUG") == names("search=%3Cnew2%3E&base=sd15") == ["mug.safetensors"]
    assert names("base=sdxl") == []
    assert names("sort=name&order=descending") == ["mug.safetensors", "cat.safetensors"]
    for query in ("base=flux", "sort=colour", "order=up"):
        with pytest.raises(ComfyServerError, match="needed one of") as refused:
            bench.get(f"{CONCEPTS}?{query}")
        assert refused.value.status == 400

    found = bench.get(f"{CONCEPTS}/cat.safetensors/inspection")
    assert (found["name"], found["fit"]) == ("cat.safetensors", None)
    ((layer, shape),) = ((row["layer"], row["shape"]) for row in found["layers"])
    assert (layer, shape) == (LAYER, [320, 768])
    for path, status in (("gone", 404), ("broken", 409)):
        with pytest.raises(ComfyServerError) as refused:
            bench.get(f"{CONCEPTS}/{path}.safetensors/inspection")
        assert refused.value.status == status


def test_saved_concepts_are_found_in_the_panel(page: Any) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    panel = open_panel(page)
    library = panel.locator(".cd-library")
    library.locator("summary").first.focus()
    page.keyboard.press("Enter")
    items = library.get_by_role("listitem")
    until(page, lambda: items.count() == 2)
    library.get_by_text("cannot be read: 1").click()
    library.get_by_text("broken.safetensors is not a readable concept file").wait_for()
    mug = items.filter(has_text="mug.safetensors")
    assert "Stable Diffusion 1.x" in mug.inner_text() and not mug.locator("img").count()
    cat = items.filter(has_text="cat.safetensors")
    until(page, lambda: cat.locator("img").evaluate("image => image.naturalWidth") == 64)
    press(cat, "<new1> cat")
    cat.get_by_text("copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "<new1> cat"

    library.get_by_role("combobox", name="Sort by").select_option("name")
    until(page, lambda: items.first.get_attribute("data-name") == "cat.safetensors")
    for palette in ("dark", "light"):
        in_palette(page, palette)
        for text in (".cd-name", ".cd-taught", ".cd-word", ".cd-buttons button"):
            assert contrast(cat.locator(text).first) > 4.5, (palette, text)
        screenshot(page, f"panel-concepts-{palette}")
    for width in (220, 600):
        panel.evaluate("(panel, width) => { panel.style.width = `${width}px`; }", width)
        assert panel.evaluate("panel => panel.scrollWidth <= panel.clientWidth")
        screenshot(page, f"panel-concepts-{width}px")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    troubles = axe.run(page, context=".cd-panel").response["violations"]
    assert not [(one["id"], [node["html"] for node in one["nodes"]]) for one in troubles]

    search = library.get_by_role("searchbox", name="Search names and words")
    search.fill("nothing of that name")
    library.get_by_text("No concept matches").wait_for()
    assert not items.count()
    search.fill("MUG")
    until(page, lambda: items.count() == 1)
    press(items.first, "Add to graph")
    until(page, lambda: page.evaluate("app.graph._nodes.length") == 2)
    graph = page.evaluate("app.graphToPrompt().then(made => made.output)")
    (load,) = (made for made in graph.values() if made["class_type"] == "LoadConcept")
    assert load["inputs"]["concept_name"] == "mug.safetensors"
    in_palette(page, "dark")


def test_load_concept_shows_which_one_is_chosen(page: Any) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    show(page, {"load": load("cat")})
    shown = page.locator(".cd-concept")
    shown.get_by_text("Stable Diffusion 1.x").wait_for()
    picture = shown.locator("img")
    until(page, lambda: picture.evaluate("image => image.naturalWidth") == 64)
    press(shown, "<new1> cat")
    shown.get_by_text("copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "<new1> cat"
    screenshot(page, "node-load-concept")
    for name, told in (("mug", "<new2> mug"), ("broken", "not a readable concept file")):
        page.evaluate(
            """name => {
                const [choice] = app.graph._nodes[0].widgets;
                choice.value = name;
                choice.callback(name);
            }""",
            f"{name}.safetensors",
        )
        shown.get_by_text(told).wait_for()
        assert not shown.locator("img").count()


def test_nodes_tell_what_they_have_found(bench: ComfyServer, page: Any) -> None:
    data = teach("cat", "cat", "cat", "<new1>")["cat-data"]
    show(
        page,
        {
            "checkpoint": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"),
            "data": data,
            "views": node(
                "CustomDiffusionViews",
                concept=["data", 0],
                **{"resolution": 64, "seed": 0, "augment": True, "flip": True, "fit": "crop"},
            ),
            "cat": load("cat"),
            "mug": load("mug"),
            "merge": merge(["cat", 0], ["mug", 0]),
            "save": node("SaveConcept", concept=["merge", 0], name="both", precision="half (fp16)"),
        },
    )
    run(page)
    notes = page.locator(".cd-notes")
    until(page, lambda: notes.count() == 3)  # the data, the merge, the saving
    told = " ".join(notes.all_inner_texts())
    assert "3 pictures are few" in told and "0.png (80 x 96 pixels)" in told
    assert "no regularization" not in told  # a word of its own needs none
    rows = notes.locator("tr")
    assert rows.first.inner_text().split("\t") == ["concept", "kept words", "largest error"]
    assert "<new2> mug" in rows.nth(2).inner_text() and "%" in rows.nth(2).inner_text()
    assert "both.safetensors" in told
    assert contrast(notes.first.locator("p").first) > 4.5
    for vue_nodes in (True, False):
        page.evaluate(
            "vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)", vue_nodes
        )
        for palette in ("light", "dark"):
            in_palette(page, palette)
            for warning in page.locator(".cd-notes .cd-warning").all():
                assert contrast(warning) >= 4.5, (vue_nodes, palette)
            screenshot(page, f"node-warnings-{palette}-{'vue' if vue_nodes else 'classic'}")
    for shown in page.locator(".cd-node").all():  # the nodes have grown: nothing is cut off
        until(page, lambda: shown.evaluate(_WITHIN_NODE))  # noqa: B023
    screenshot(page, "node-notes")

    page.wait_for_function("!app.canvas.dirty_canvas && !app.canvas.dirty_bgcanvas")
    saving = page.locator(".cd-node", has_text="both.safetensors")
    low = saving.evaluate("frame => frame.clientHeight")
    saving.locator(".cd-notes").evaluate("notes => { notes.style.height = '280px'; }")
    until(page, lambda: saving.evaluate("frame => frame.clientHeight") >= 280 > low)


def test_the_train_node_shows_its_training_also_after_a_reload(
    bench: ComfyServer, page: Any
) -> None:
    graph = teach(
        "cat",
        "cat",
        "cat",
        "<new1>",
        wait=False,
        steps=10_000,
        preview_every_steps=4,
    )
    show(page, graph)
    run(page)
    training = page.locator(".cd-training")
    training.wait_for(timeout=LONG_MS)
    until(page, lambda: "learns" in training.inner_text())
    until(page, lambda: training.locator(".cd-sample img").count() == 1)
    until(page, lambda: "L" in training.locator(".cd-average").get_attribute("d"))
    screenshot(page, "node-train")
    saved = page.evaluate("app.graph.serialize()")
    page.evaluate("app.graph.clear()")
    assert not training.count()
    page.evaluate("workflow => app.loadGraphData(workflow)", saved)
    until(page, lambda: "learns" in training.inner_text())
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(4000)
    metrics = [url for url in asked if "/metrics" in url]  # of the node that is there, at most
    assert len(metrics) <= 5, "a node that is gone still asks"
    # It is a display: what is sent and saved does not know of it.
    sent = page.evaluate("app.graphToPrompt().then(made => JSON.stringify(made.output))")
    assert "training" not in sent

    (job,) = bench.get(JOBS)["jobs"]
    page.evaluate("app.extensionManager.setting.set('CustomDiffusion.SoundWhenDone', true)")
    bench.post(f"{JOBS}/{job['id']}/stop")
    page.get_by_text("“cat” was stopped and saved").wait_for()
    screenshot(page, "toast")


def test_more_steps_are_another_training_that_goes_on(bench: ComfyServer, page: Any) -> None:
    for job in bench.get(JOBS)["jobs"]:
        until(page, lambda: bench.get(f"{JOBS}/{job['id']}")["state"] == "stopped")  # noqa: B023
        bench.delete(f"{JOBS}/{job['id']}")
    bench.run(teach("cat", "cat", "cat", "<new1>", steps=3, seed=1))
    open_panel(page)
    finished = card(page, "finished")
    press(finished, "Extend")
    dialog = page.get_by_role("dialog")
    dialog.locator("input").fill("none")
    dialog.locator("input").press("Enter")
    page.get_by_text("is not a number of steps").wait_for()
    press(finished, "Extend")
    dialog.locator("input").fill("2")
    screenshot(page, "panel-more-steps")
    dialog.locator("input").press("Enter")
    until(page, lambda: page.locator(".cd-job[data-state=finished]").count() == 2)
    shorter, longer = (bench.get(f"{JOBS}/{job['id']}") for job in bench.get(JOBS)["jobs"])
    assert (shorter["steps"], longer["steps"]) == (3, 5)
    losses = [bench.get(f"{JOBS}/{job['id']}/metrics")["losses"] for job in (shorter, longer)]
    assert losses[1][:3] == losses[0]
    # Where extra_model_paths.yaml says.
    folders = {path.name for path in (bench.base / "elsewhere").iterdir()}
    assert folders == {shorter["id"], longer["id"]}


def test_typing_offers_the_words_of_concepts(page: Any) -> None:
    show(page, draw("photo of a "))
    box = page.locator("textarea").first
    offer = page.get_by_role("listbox", name="Trigger words of your concepts")
    box.click()
    box.press("End")
    box.press_sequentially("<new")
    offer.wait_for()
    rows = offer.evaluate(
        "list => [...list.children].map(r => [...r.children].map(c => c.innerText))"
    )
    assert [word for word, _ in rows] == ["<new1> cat", "<new2> mug"]
    for (_, sources), name in zip(rows, ("cat", "mug"), strict=True):  # and of tests before
        assert f"{name}.safetensors · Stable Diffusion 1.x" in sources.split(", ")
    screenshot(page, "completion")
    box.press("ArrowDown")
    box.press("Enter")
    assert box.input_value() == "photo of a <new2> mug"
    assert not offer.is_visible()
    box.press_sequentially(" and <x")
    assert not offer.is_visible()
    box.press("Backspace")
    offer.wait_for()
    box.press("Escape")
    assert not offer.is_visible()
    box.press_sequentially("new1")
    offer.get_by_role("option").first.click()
    assert box.input_value() == "photo of a <new2> mug and <new1> cat"
    sent = page.evaluate("app.graphToPrompt().then(made => JSON.stringify(made.output))")
    assert "photo of a <new2> mug and <new1> cat" in sent


def test_a_note_is_offered_no_words(page: Any) -> None:
    for vue_nodes in (False, True):
        page.evaluate(
            "vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)", vue_nodes
        )
        page.evaluate(
            """() => {
                app.graph.clear();
                app.graph.add(LiteGraph.createNode("Note"));
                const prompt = LiteGraph.createNode("CLIPTextEncode");
                prompt.pos = [500, 0];
                app.graph.add(prompt);
                app.canvas.ds.offset = [100, 200];
                app.canvas.setDirty(true, true);
            }"""
        )
        boxes = page.locator("textarea:visible")
        until(page, lambda: boxes.count() == 2)  # noqa: B023
        note, prompt = sorted(boxes.all(), key=lambda box: box.bounding_box()["x"])
        offer = page.get_by_role("listbox", name="Trigger words of your concepts")
        for box, offered in ((prompt, True), (note, False), (prompt, True)):
            box.click()
            box.fill("")
            box.press_sequentially("<new")
            if offered:
                offer.wait_for()
            else:
                page.wait_for_timeout(300)
            assert offer.is_visible() is offered, (vue_nodes, offered)
            box.press("Escape")
            box.blur()
    page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def test_a_long_list_of_words_stays_in_the_window_and_scrolls(
    bench: ComfyServer, page: Any
) -> None:
    folder = bench.models / "custom_diffusion" / "many"
    for number in range(20):
        word = f"<many{number:02}>"
        write_concept(made_concept({LAYER: (320, 768)}, word), folder / f"{number:02}.safetensors")
    show(page, draw(""))
    box = page.locator("textarea").first
    page.evaluate(
        """() => {
            const node = app.graph._nodes.find(each => each.comfyClass === "CLIPTextEncode");
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [1100 - node.pos[0], 700 - node.pos[1]];  // a corner below
            app.canvas.setDirty(true, true);
        }"""
    )
    until(page, lambda: box.bounding_box()["y"] > 600)
    box.click()
    box.press_sequentially("<many")
    offer = page.get_by_role("listbox", name="Trigger words of your concepts")
    offer.wait_for()
    options = offer.get_by_role("option")
    assert options.count() == 20
    within = """list => {
        const { left, top, right, bottom } = list.getBoundingClientRect();
        return left >= 0 && top >= 0 && right <= innerWidth && bottom <= innerHeight;
    }"""
    assert offer.evaluate(within)
    for _ in range(15):
        box.press("ArrowDown")
    chosen = offer.locator("[aria-selected=true]")
    until(page, lambda: chosen.inner_text().startswith("<many15>"))
    seen = "row => row.offsetTop - row.parentElement.scrollTop"
    assert 0 <= chosen.evaluate(seen) < offer.evaluate("list => list.clientHeight")
    marks = """row => {
        const probe = document.createElement("i");
        row.parentElement.append(probe);
        probe.style.color = getComputedStyle(row).getPropertyValue("--cd-strong");
        return probe;
    }"""
    for palette in ("dark", "light"):
        in_palette(page, palette)
        assert offer.is_visible()
        assert contrast(chosen.locator("span")) >= 4.5, palette
        assert contrast(chosen.locator("small")) >= 4.5, palette
        mark = chosen.evaluate_handle(marks)
        assert contrast(mark) >= 3, palette  # the bar at the row's left, against the list
        mark.evaluate("mark => mark.remove()")
        screenshot(page, f"completion-long-{palette}")
    in_palette(page, "dark")
    offer.evaluate("list => list.scrollTo(0, 0)")
    page.mouse.move(*[offer.bounding_box()[side] + 20 for side in ("x", "y")])
    page.mouse.wheel(0, 50)
    until(page, lambda: offer.evaluate("list => list.scrollTop") > 0)
    assert offer.is_visible()
    box.press("Enter")
    assert box.input_value() == "<many15> cat"
    for path in folder.iterdir():
        path.unlink()


def test_what_completion_computes(page: Any) -> None:
    computed = page.evaluate(
        """async modules => {
            const { offers, completed } = await import(`${modules}/completion.js`);
            const words = [
                { name: "a", family: "SD", prompts: ["<new1> cat", "<new2> mug"] },
                { name: "b", family: "", prompts: ["<New1> cat", "<new1> cat"] },
            ];
            return {
                begun: offers(words, "a <NEW1"),
                none: [offers(words, "a new"), offers(words, "a <new1> "), offers(words, "a < ")],
                middle: completed("a <ne and more", 5, "<new1> cat"),
            };
        }""",
        f"/extensions/{PACK_FOLDER}/js",
    )
    assert computed["begun"] == [
        {"word": "<new1> cat", "sources": ["a · SD", "b"]},
        {"word": "<New1> cat", "sources": ["b"]},
    ]
    assert computed["none"] == [[], [], []]
    assert computed["middle"] == {"text": "a <new1> cat and more", "caret": 12}


def test_new_train_nodes_begin_as_it_is_set(page: Any) -> None:
    made = """([shares, keeps]) => {
        app.extensionManager.setting.set("CustomDiffusion.ShareDevice", shares);
        app.extensionManager.setting.set("CustomDiffusion.KeepBest", keeps);
        const { widgets } = LiteGraph.createNode("CustomDiffusionTrain");
        const value = name => widgets.find(widget => widget.name === name).value;
        return [value("share_device"), value("keep_best")];
    }"""
    assert page.evaluate(made, [True, 3]) == [True, 3]
    assert page.evaluate(made, [False, 1]) == [False, 1]


def test_the_page_speaks_the_users_language(page: Any) -> None:
    page.evaluate("app.extensionManager.setting.set('Comfy.Locale', 'zh')")
    page.reload()
    page.wait_for_function("!!window.app?.extensionManager?.getSidebarTabs", timeout=LONG_MS)
    tab = "custom-diffusion-trainings"
    page.wait_for_function(
        f"app.extensionManager.getSidebarTabs().find(each => each.id === '{tab}')"
    )
    title = page.evaluate(
        f"app.extensionManager.getSidebarTabs().find(each => each.id === '{tab}').title"
    )
    page.evaluate("app.extensionManager.setting.set('Comfy.Locale', 'en')")
    assert "训练" in title
