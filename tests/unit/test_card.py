"""A concept's card, read from the header alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from custom_diffusion.concept.errors import ConceptFileError
from custom_diffusion.concept.file import write_concept
from custom_diffusion.inspection.card import read_card, thumbnail
from support.concepts import random_concept


@pytest.fixture
def file(tmp_path: Path) -> Path:
    concept = replace(random_concept(), provenance={"method": "low-rank", "steps": 250})
    return write_concept(concept, tmp_path / "my.cat.safetensors")


def test_the_card_says_what_the_concept_is(file: Path) -> None:
    card = read_card(file)
    assert card.file == "my.cat.safetensors"
    assert card.megabytes == pytest.approx(file.stat().st_size / 1e6, abs=0.01)
    assert (card.family, card.prompts) == ("Stable Diffusion 1.x", ("<new1> cat",))
    assert (card.method, card.steps) == ("low-rank", 250)
    assert card.created[:2] == "20"


def test_no_tensor_is_needed(file: Path) -> None:
    """A library on a slow disk: only the header is looked at, so damage behind it is not seen."""
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    content[8 + header :] = b"\xff" * (len(content) - 8 - header)
    file.write_bytes(content)
    assert read_card(file).prompts == ("<new1> cat",)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x02pickle"])
def test_what_is_no_concept_is_named(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(ConceptFileError, match=r"my\.cat\.safetensors"):
        read_card(file)


@pytest.mark.parametrize("name", ["my.cat.preview.png", "my.cat.png", "my.cat.jpg"])
def test_the_picture_beside_it_is_found(file: Path, name: str) -> None:
    assert thumbnail(file) is None
    (file.parent / name).write_bytes(b"picture")
    assert thumbnail(file) == file.parent / name
