"""Files of strangers in a list: each is a card or has a reason, and none breaks the rest."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from custom_diffusion.cli import main
from custom_diffusion.concept.errors import ConceptFileError, CustomDiffusionError
from custom_diffusion.concept.file import read_concept, write_concept
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.concept.plain import is_plain, plain_text
from custom_diffusion.formats.base import read_base
from custom_diffusion.formats.content import ENDINGS
from custom_diffusion.formats.importing import open_concept
from custom_diffusion.inspection.any_card import read_any_card
from custom_diffusion.inspection.library import Listing, list_concepts
from custom_diffusion.inspection.report import inspect_concept
from support.concepts import random_concept
from support.hostile import CARD, Hostile, concept, concept_with, hostile_files

FILES = hostile_files()
LONGEST_ANSWER = 5000


def cards_of(folder: Path) -> Listing:
    names = [path.name for path in folder.iterdir() if path.suffix in ENDINGS]
    return list_concepts(names, lambda name: read_any_card(folder / name))


def assert_plain(listing: Listing) -> None:
    """Strict JSON that can be sent, and that does nothing to a terminal."""
    text = json.dumps(listing.as_json(), allow_nan=False, ensure_ascii=False)
    text.encode()
    assert is_plain(text)


def test_there_are_many() -> None:
    assert len(FILES) > 110
    assert len({file.name for file in FILES}) == len(FILES)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("file", FILES, ids=lambda file: plain_text(file.name, 100))
def test_each_alone(file: Hostile, tmp_path: Path) -> None:
    file.write(tmp_path / file.name)
    before = time.monotonic()
    listing = cards_of(tmp_path)
    assert_plain(listing)
    assert len(listing.cards) + len(listing.unreadable) == 1
    if file.reason == CARD:
        assert listing.cards, listing.unreadable
    else:
        (reason,) = listing.unreadable.values()
        assert re.search(file.reason, reason) and len(reason) < LONGEST_ANSWER
    for read in (read_any_card, read_concept, open_concept, read_base):
        try:
            read(tmp_path / file.name)
        except CustomDiffusionError as error:
            assert is_plain(str(error).replace("\n", ""))
            assert len(str(error)) < LONGEST_ANSWER
    assert time.monotonic() - before < 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in FILES:
        file.write(tmp_path / file.name)
    for name in ("good-1", "good-2"):
        write_concept(random_concept(family=FAMILIES["sd15"]), tmp_path / f"{name}.safetensors")
    return tmp_path


def test_all_together_with_two_good_ones(folder: Path) -> None:
    listing = cards_of(folder)
    assert_plain(listing)
    assert {"good-1.safetensors", "good-2.safetensors"} <= listing.cards.keys()
    refused = {plain_text(file.name, 1000) for file in FILES if file.reason != CARD}
    assert listing.unreadable.keys() == refused
    assert len(listing.cards) + len(listing.unreadable) == len(FILES) + 2
    for order in ("name", "date", "base", "size"):
        names = [path.name for path in folder.iterdir() if path.suffix in ENDINGS]
        again = list_concepts(names, lambda name: read_any_card(folder / name), sort=order)
        assert again.cards.keys() == listing.cards.keys()


@pytest.mark.parametrize("arguments", [[], ["--json"]], ids=["text", "json"])
def test_the_command_lists_them(
    folder: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", str(folder), *arguments]) == 0
    shown = capfd.readouterr().out
    assert is_plain(shown.replace("\n", ""))
    if arguments:
        listed = json.loads(shown, parse_constant=pytest.fail)
        assert {"good-1.safetensors", "good-2.safetensors"} <= {
            card["name"] for card in listed["concepts"]
        }
    else:
        assert shown.count("cannot be read: ") == sum(file.reason != CARD for file in FILES)


@pytest.mark.skipif(os.name == "nt", reason="uses POSIX users")
@pytest.mark.slow
def test_a_file_that_may_not_be_read_is_one_of_them(tmp_path: Path) -> None:
    """And can be read as soon as it may be: the refusal is not kept."""
    (tmp_path / "secret.safetensors").write_bytes(concept())
    tests = Path(__file__).resolve().parents[1]
    code = f"""
import os, sys
sys.path.insert(0, {str(tests)!r})
import conftest
from pathlib import Path
from custom_diffusion.inspection.library import list_concepts
from custom_diffusion.inspection.any_card import read_any_card
name = "secret.safetensors"
os.chmod(name, 0)
root = os.geteuid() == 0
if root:
    os.chmod(".", 0o755)
    os.seteuid(65534)
print(list_concepts([name], lambda name: read_any_card(Path(name))).unreadable[name])
if root:
    os.seteuid(0)
os.chmod(name, 0o644)
print(list(list_concepts([name], lambda name: read_any_card(Path(name))).cards))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert re.search("ermission.*\n\\['secret", run.stdout), run.stdout + run.stderr


def test_what_is_said_of_one_that_is_a_concept(tmp_path: Path) -> None:
    """Its provenance, as deep as may be, and names of layers: in a terminal, and as JSON."""
    layer = "\x1b[2J.attn2.to_k"
    nested: object = "\x1b[31mred\u202e"
    for _ in range(90):
        nested = {"\x07parents": [nested]} if isinstance(nested, str) else {"parents": nested}
    path = tmp_path / "a.safetensors"
    path.write_bytes(
        concept_with(
            {f"diffusion_model.{layer}.diff": torch.ones(8, 768)},
            provenance=json.dumps({"loss": float("nan"), "nested": nested}),
        )
    )
    inspection = inspect_concept(read_concept(path), path)
    for layers in (True, False):
        assert is_plain(inspection.text(layers).replace("\n", ""))
    json.dumps(inspection.as_json(), allow_nan=False)


def test_a_file_that_vanishes_between_listing_and_reading(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(concept())

    def card_of(name: str) -> object:
        (tmp_path / name).unlink()
        return read_any_card(tmp_path / name)

    listing = list_concepts(["a.safetensors"], card_of)  # type: ignore[arg-type]
    assert "There is no concept file" in listing.unreadable["a.safetensors"]


def test_headers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are refused; a file that changes is read again."""
    from custom_diffusion.concept import tensors

    reads: list[str] = []
    header_of = tensors.Header.of

    def count(text: bytes, file_bytes: int) -> tensors.Header:
        reads.append("")
        return header_of(text, file_bytes)

    monkeypatch.setattr(tensors.Header, "of", count)
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    good.write_bytes(concept())
    bad.write_bytes(concept(tokens="5"))
    for _ in range(3):
        assert len(cards_of(tmp_path).cards) == 1
    assert len(reads) == 2
    good.write_bytes(concept(base_hash="another"))
    assert len(cards_of(tmp_path).cards) == 1
    assert len(reads) == 3
    good.unlink()
    with pytest.raises(ConceptFileError):
        read_any_card(good)
