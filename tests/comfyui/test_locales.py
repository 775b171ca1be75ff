"""What nodes and panel say: every input has a tooltip, and all of it is translated, and no more.

ComfyUI shows English where a translation is missing and overlooks one that belongs to nothing, so
nobody would notice that a node has changed and its translations have not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from support.comfy_server import PACK_FOLDER, REPOSITORY, ComfyServer

LANGUAGES = ("ja", "ko", "zh")
PANEL = "customDiffusion"  # in main.json: the words that the pack looks up itself, web/js/words.js
Texts = dict[str, str]
"""What is said, by where: `LoadConcept.inputs.concept_name.name`."""


def inputs_of(groups: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and options of a node's inputs; the frontend looks `method.steps` up as method_steps."""
    for group in ("required", "optional"):
        for name, (kind, *rest) in groups.get(group, {}).items():
            options = rest[0] if rest else {}
            yield prefix + name, options
            if kind == "COMFY_DYNAMICCOMBO_V3":
                for choice in options["options"]:
                    yield from inputs_of(choice["inputs"], f"{prefix}{name}_")
            elif kind == "COMFY_AUTOGROW_V3":
                yield from slots_of(options["template"], f"{prefix}{name}_")


def slots_of(template: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    ((_, options),) = inputs_of(template["input"])
    numbered = [f"{template.get('prefix')}{number}" for number in range(template.get("max", 0))]
    for name in template.get("names", numbered):
        yield f"{prefix}{name}", options


def english(node: str, info: Mapping[str, Any]) -> Texts:
    """What a node says in its schema; an output that is named like its type is named by ComfyUI."""
    texts = {f"{node}.{key}": info[key] for key in ("display_name", "description")}
    for name, options in inputs_of(info["input"]):
        texts[f"{node}.inputs.{name}.name"] = name
        if options.get("tooltip"):
            texts[f"{node}.inputs.{name}.tooltip"] = options["tooltip"]
    outputs = zip(info["output"], info["output_name"], info["output_tooltips"], strict=True)
    for index, (kind, name, tooltip) in enumerate(outputs):
        if name != kind:
            texts[f"{node}.outputs.{index}.name"] = name
        if tooltip:
            texts[f"{node}.outputs.{index}.tooltip"] = tooltip
    return texts


def flat(tree: Mapping[str, Any], prefix: str = "") -> Texts:
    texts = {}
    for key, value in tree.items():
        path = prefix + key
        texts |= flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return texts


@pytest.fixture(scope="module")
def said(server: ComfyServer) -> Texts:
    texts: Texts = {}
    for node, info in server.object_info().items():
        if info["python_module"] == f"custom_nodes.{PACK_FOLDER}":
            texts |= english(node, info)
    return texts


def test_every_input_has_a_tooltip(server: ComfyServer) -> None:
    """Those that come with a choice or grow too; a graph is wired by people who read no manual."""
    inputs = {
        f"{node}.{name}": options
        for node, info in server.object_info().items()
        if info["python_module"] == f"custom_nodes.{PACK_FOLDER}"
        for name, options in inputs_of(info["input"])
    }
    assert {"CustomDiffusionTrain.method_rank", "RouteConcepts.concepts_strength_8"} < set(inputs)
    assert [name for name, options in inputs.items() if not options.get("tooltip")] == []


@pytest.fixture(params=LANGUAGES)
def translated(request: pytest.FixtureRequest, server: ComfyServer) -> Texts:
    return flat(server.get("/i18n")[request.param]["nodeDefs"])


def test_all_that_the_nodes_say_is_translated_and_no_more(said: Texts, translated: Texts) -> None:
    assert said
    assert translated.keys() - said.keys() == set(), "belongs to nothing"
    assert said.keys() - translated.keys() == set(), "is missing"


def test_every_translation_is_a_text_that_the_frontend_shows_as_it_is(translated: Texts) -> None:
    assert odd(translated) == {}


def odd(texts: Texts) -> Texts:
    """Those that vue-i18n does not show as they are: it reads placeholders, links and plurals."""
    return {path: text for path, text in texts.items() if not text or set(text) & set("{}@|")}


def read(language: str, name: str) -> Any:
    return json.loads((REPOSITORY / "locales" / language / f"{name}.json").read_text("utf-8"))


def panel_words(language: str) -> Texts:
    return flat(read(language, "main")[PANEL])


def looked_up_by_the_frontend(language: str) -> Texts:
    """The page's words that ComfyUI's frontend translates, merged as ComfyUI merges the files."""
    tree = read(language, "main") | {
        name: read(language, name) for name in ("settings", "commands")
    }
    return flat({key: value for key, value in tree.items() if key != PANEL})


def registered() -> set[str]:
    """Where the frontend looks for what the page registers, in whose ids it reads a dot as _."""
    scripts = sorted((REPOSITORY / "web" / "js").glob("*.js"))
    source = "\n".join(script.read_text("utf-8") for script in scripts)
    ids = set(re.findall(r'"(CustomDiffusion\.\w+)"', source))
    settings = set(re.findall(r'_SETTING = "(CustomDiffusion\.\w+)"', source))
    labels = dict(re.findall(r'id: "(CustomDiffusion\.\w+)",\s+label: "([^"]+)"', source))
    categories = set(re.findall(r'category: \["Custom Diffusion", "([^"]+)"', source))
    (tab,) = re.findall(r' TAB = "([^"]+)"', source)
    assert settings and labels and categories
    assert ids == settings | labels.keys(), "an id that is written in another way"
    commands = {*labels, f"Workspace.ToggleSidebarTab.{tab}"}
    return (
        {f"settings.{name.replace('.', '_')}.name" for name in settings}
        | {f"commands.{name.replace('.', '_')}.label" for name in commands}
        | {f"settingsCategories.{category}" for category in categories}
        | {f"menuLabels.{label}" for label in labels.values()}
    )


def placeholders(words: Texts) -> dict[str, list[str]]:
    return {key: sorted(re.findall(r"\{.*?\}", text)) for key, text in words.items()}


@pytest.mark.parametrize("language", LANGUAGES)
def test_all_words_of_the_panel_are_translated_with_their_placeholders(language: str) -> None:
    words = panel_words(language)
    assert placeholders(words) == placeholders(panel_words("en"))
    assert all(words.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_all_settings_and_commands_are_translated_and_no_more(language: str) -> None:
    translated = looked_up_by_the_frontend(language)
    assert translated.keys() - registered() == set(), "belongs to nothing"
    assert registered() - translated.keys() == set(), "is missing"
    assert odd(translated) == {}
