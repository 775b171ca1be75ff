"""Lists of concept files: searched, filtered, sorted, and what cannot be read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch
from custom_diffusion.cli import main
from custom_diffusion.concept.concept import Concept, ModifierToken
from custom_diffusion.concept.file import write_concept
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.inspection.any_card import read_any_card
from custom_diffusion.inspection.card import ConceptCard
from custom_diffusion.inspection.library import Listing, list_concepts
from safetensors import safe_open
from safetensors.torch import save_file


def save(path: Path, token: str, noun: str, family: str, created: str, vectors: int = 1) -> None:
    """A concept of a given age; more vectors make a larger file."""
    widths = FAMILIES[family].text_encoders
    rows = {encoder: torch.ones(vectors, width) for encoder, width in widths.items()}
    concept = Concept(FAMILIES[family], {}, (ModifierToken(token, noun, rows),))
    path.parent.mkdir(exist_ok=True)
    write_concept(replace(concept, provenance={"method": "low-rank", "steps": 250}), path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = {**file.metadata(), "created": created}
    save_file(tensors, path, metadata)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "Tom.safetensors", "<tom>", "cat", "sdxl", "2026-03-01T00:00:00+00:00")
    save(tmp_path / "mug.safetensors", "<new2>", "mug", "sd15", "2026-05-01T00:00:00+00:00", 60)
    save(tmp_path / "a/cat.safetensors", "<new1>", "cat", "sd15", "2026-04-01T00:00:00+00:00", 20)
    (tmp_path / "broken.safetensors").write_bytes(b"{}")
    return tmp_path


def cards_in(folder: Path) -> Callable[[str], ConceptCard]:
    return lambda name: read_any_card(folder / name)


NAMES = ["broken.safetensors", "mug.safetensors", "a/cat.safetensors", "Tom.safetensors"]
A_CAT, MUG, TOM = "a/cat.safetensors", "mug.safetensors", "Tom.safetensors"


def listed(folder: Path, **wanted: str) -> list[str]:
    return list(list_concepts(NAMES, cards_in(folder), **wanted).cards)


def test_what_it_says_of_each(folder: Path) -> None:
    found = list_concepts(NAMES, cards_in(folder))
    (card,) = (card for name, card in found.cards.items() if name == TOM)
    assert (card.base, card.prompts, card.thumbnail) == ("sdxl", ("<tom> cat",), False)
    told = found.as_json()
    assert [concept["name"] for concept in told["concepts"]] == [A_CAT, MUG, TOM]
    assert "not a readable concept file" in told["unreadable"]["broken.safetensors"]


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("", [A_CAT, MUG, TOM]),
        ("CAT", [A_CAT, TOM]),  # a class noun, and a file's name
        ("<new", [A_CAT, MUG]),  # a token
        ("tom cat", [TOM]),  # all words
        ("a/", [A_CAT]),
        ("dog", []),
    ],
)
def test_searching(folder: Path, search: str, found: list[str]) -> None:
    assert listed(folder, search=search) == found


def test_what_cannot_be_read_is_told_whatever_is_searched_for(folder: Path) -> None:
    found = list_concepts(NAMES, cards_in(folder), search="dog", base="sd15")
    assert list(found.unreadable) == ["broken.safetensors"]


def test_one_base_model(folder: Path) -> None:
    assert listed(folder, base="sd15") == [A_CAT, MUG]
    assert listed(folder, base="sd2") == []


@pytest.mark.parametrize(
    ("sort", "order", "found"),
    [
        ("name", "", [A_CAT, MUG, TOM]),  # not T before a and m
        ("name", "descending", [TOM, MUG, A_CAT]),
        ("date", "", [MUG, A_CAT, TOM]),
        ("date", "ascending", [TOM, A_CAT, MUG]),
        ("base", "", [A_CAT, MUG, TOM]),
        ("base", "descending", [TOM, A_CAT, MUG]),  # equals by their names
        ("size", "", [MUG, A_CAT, TOM]),
        ("size", "ascending", [TOM, A_CAT, MUG]),
    ],
)
def test_sorting(folder: Path, sort: str, order: str, found: list[str]) -> None:
    assert listed(folder, sort=sort, order=order) == found


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"base": "flux"}, "base is 'flux', needed one of sd15, sd2, sdxl"),
        ({"sort": "colour"}, "sort is 'colour', needed one of name, date, base, size"),
        ({"order": "up"}, "order is 'up', needed one of ascending, descending"),
    ],
)
def test_what_is_not_known_is_refused(folder: Path, wanted: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        list_concepts(NAMES, cards_in(folder), **wanted)


def test_a_file_that_is_gone_is_one_that_cannot_be_read(folder: Path) -> None:
    found: Listing = list_concepts(["gone.safetensors", MUG], cards_in(folder))
    assert list(found.cards) == [MUG]
    assert "There is no concept file" in found.unreadable["gone.safetensors"]


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(folder), "--sort", "date"]) == 0
    head, *rows, broken = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == [MUG, A_CAT, TOM]
    column = head.index("prompts")
    assert [row[column:].split()[0] for row in rows] == ["<new2>", "<new1>", "<tom>"]
    assert "low-rank, 250 steps" in rows[0] and "2026-05-01" in rows[0]
    assert broken.startswith("cannot be read: broken.safetensors")

    assert main(["list", str(folder), "--search", "cat", "--base", "sdxl", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["concepts"]
    assert (found["name"], found["created"]) == (TOM, "2026-03-01T00:00:00+00:00")

    assert main(["list", str(folder), "--search", "dog"]) == 0
    assert "no concept found" in capsys.readouterr().out
    assert main(["list", str(folder / "nowhere")]) == 1
    assert "There is no folder" in capsys.readouterr().err


def test_files_of_other_tools_are_told_apart_from_broken_ones(folder: Path) -> None:
    put_other_files(folder)
    listing = list_concepts(
        [*NAMES, *OTHER_NAMES], cards_in(folder), search="nothing has this", base="sd2"
    )
    assert listing.other == ("style.safetensors", "toy.bin")
    assert list(listing.unreadable) == ["broken.safetensors"] and not listing.cards


def test_files_of_other_tools_are_listed_searched_and_sorted_with_the_concepts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_other_files(folder)

    def found(**wanted: str) -> list[str]:
        return list(list_concepts([*NAMES, *OTHER_NAMES], cards_in(folder), **wanted).cards)

    style, toy = OTHER_NAMES
    assert found() == [A_CAT, MUG, style, TOM, toy]
    assert found(sort="date")[:2] == [toy, MUG]
    assert found(sort="base") == [A_CAT, MUG, style, TOM, toy]
    assert found(search="toy") == [toy]
    assert found(base="sd15") == [A_CAT, MUG, style]
    assert found(base="sdxl") == [TOM]
    bases = list_concepts([*NAMES, *OTHER_NAMES], cards_in(folder), search="toy").bases
    assert bases == {"sd15": "Stable Diffusion 1.x", "sdxl": "Stable Diffusion XL"}

    assert main(["list", str(folder)]) == 0
    rows = {row.split()[0]: row for row in capsys.readouterr().out.splitlines()}
    assert "another tool (embedding)" in rows[style] and "2024-01-01" in rows[style]
    assert "another tool (unknown)" in rows[toy] and "2026-06-01" in rows[toy]


OTHER_NAMES = ["style.safetensors", "toy.bin"]


def put_other_files(folder: Path) -> None:
    style, toy = (folder / name for name in OTHER_NAMES)
    save_file({"emb_params": torch.ones(1, 768)}, style)
    torch.save({"<toy>": torch.ones(768)}, toy)
    for path, year, month in ((style, 2024, 1), (toy, 2026, 6)):
        at = datetime(year, month, 1, 12, tzinfo=timezone.utc).timestamp()
        os.utime(path, (at, at))
