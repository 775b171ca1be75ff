"""Names of files that are made of what people write."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path, PureWindowsPath

import pytest
from custom_diffusion.concept.atomic import write_text_atomically
from custom_diffusion.concept.errors import ConceptFileError
from custom_diffusion.concept.file import write_new_concept
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.concept.naming import safe_file_name, write_new
from custom_diffusion.trainer.jobs.folder import JobFolder
from support.concepts import random_concept

SUFFIXES = ("", ".safetensors", ".preview.png", "-2.safetensors", "-0123456789ab")
DEVICES = (
    *("CON", "prn", "Aux", "NUL", "COM1", "com9", "LPT1", "lpt9", "COM¹", "com²", "LPT³"),
    *("CONIN$", "conout$"),
)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("é", "é"),
        (unicodedata.normalize("NFD", "Crème brûlée"), "Crème-brûlée"),
        (unicodedata.normalize("NFD", "Ángström ñandú"), "Ángström-ñandú"),
        (unicodedata.normalize("NFD", "ガラス"), "ガラス"),
        (unicodedata.normalize("NFD", "고양이"), "고양이"),
        ("हिन्दी", "हिन्दी"),  # vowel signs are marks that no letter is composed with
        ("ไม้", "ไม้"),
        ("x\u0335", "x\u0335"),
        ("\u0301cat", "cat"),  # an accent of nothing
        ("cat/\u0301dog", "cat--dog"),
        ("cat. ", "cat"),
        ("cat . .", "cat"),
        ("cat\u202egpj.exe", "cat-gpj.exe"),
        ("\ud800", "concept"),
    ],
)
def test_letters_are_kept_with_their_accents(name: str, expected: str) -> None:
    assert safe_file_name(name) == unicodedata.normalize("NFC", expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ending", ["", ".cat", ".", " ", ".tar.gz", " .txt"])
def test_no_name_is_a_device_of_windows(device: str, ending: str) -> None:
    safe = safe_file_name(f"{device}{ending}")
    for suffix in SUFFIXES:
        assert not PureWindowsPath(f"{safe}{suffix}").is_reserved(), safe
    assert device.rstrip("$").casefold() in safe.casefold()


def test_names_that_only_look_like_devices_are_kept() -> None:
    for name in ("console", "con-1", "communist", "com10", "my.con", "null", "lpt"):
        assert safe_file_name(name) == name


def test_any_name_is_safe_and_stays_as_it_is() -> None:
    rng = random.Random(0)
    alphabets = [range(0x20, 0x7F), range(0xD800), range(0xE000, 0x110000), range(0x300, 0x370)]
    pieces = [*DEVICES, ".", " ", "-", "$", "é", "e\u0301"]
    for _ in range(5000):
        name = "".join(
            rng.choice(pieces) if rng.random() < 0.2 else chr(rng.choice(rng.choice(alphabets)))
            for _ in range(rng.choice([1, 2, 5, 60, 300]))
        )
        safe = safe_file_name(name)
        assert 0 < len(safe.encode()) <= 100
        assert not set(safe) & set('<>:"/\\|?*\0\n ') and safe.isprintable()
        assert safe[0] not in ".-" and safe[-1] not in ".-"
        assert unicodedata.is_normalized("NFC", safe)
        assert safe_file_name(safe) == safe
        for suffix in SUFFIXES:
            assert not PureWindowsPath(f"{safe}{suffix}").is_reserved()
            assert len(f"{safe}{suffix}".encode()) < 143  # what encrypted file systems take


def test_two_names_never_share_a_file(tmp_path: Path) -> None:
    """Also where a file system takes them for one: what counts is what is there."""

    def write(text: str) -> Path:
        def put(path: Path) -> Path:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
            return path

        return write_new(tmp_path, text, put)

    names = ["a/b", "a-b", "a:b", "con", "_con", "é", "e\u0301", "x" * 300, "x" * 301]
    paths = [write(name) for name in names]
    assert len(set(paths)) == len(names)
    assert [path.read_text(encoding="utf-8") for path in paths] == names


@pytest.mark.parametrize("noun", ["n" * 300, "猫" * 300, "e\u0301" * 300, "con"])
def test_a_noun_of_any_length_names_a_job_and_a_concept(tmp_path: Path, noun: str) -> None:
    folders = [JobFolder.create(tmp_path / "jobs", noun, {"steps": 1}) for _ in range(2)]
    assert folders[0].path != folders[1].path
    assert all(folder.description.name == noun for folder in folders)
    concept = random_concept(family=FAMILIES["sd15"], rank=1)
    paths = [write_new_concept(concept, tmp_path, noun) for _ in range(2)]
    assert paths[0] != paths[1] and all(path.is_file() for path in paths)
    folders[0].write_thumbnail(paths[0])


def test_a_file_of_the_longest_name_can_be_written(tmp_path: Path) -> None:
    """The temporary name beside it is not longer."""
    write_text_atomically(tmp_path / ("n" * 255), "text")
    with pytest.raises(ConceptFileError, match="could not be written"):
        write_text_atomically(tmp_path / ("n" * 256), "text")
    assert [path.name for path in tmp_path.iterdir()] == ["n" * 255]
