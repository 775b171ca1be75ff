"""Names that no file can have, and names that a terminal cannot show, on the command line."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from custom_diffusion.cli import main
from custom_diffusion.concept.file import read_concept
from custom_diffusion.concept.plain import json_text, read_json
from custom_diffusion.concept.regular_files import open_regular
from custom_diffusion.trainer.data.folders import load_folder
from custom_diffusion.trainer.regularization.collection import parts_of
from PIL import Image
from support.hostile import concept

LONG = "a" * 5000
GOOD, NEW, PICTURES = "good.safetensors", "new.safetensors", "pictures"


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", LONG],
        ["inspect", GOOD, "--base", LONG],
        ["list", LONG],
        ["import", LONG, "--output", NEW],
        ["import", GOOD, "--base", LONG, "--output", NEW],
        ["import", GOOD, "--output", LONG],
        ["export", GOOD, "--format", "checkpoint", "--base", LONG, "--output", NEW],
        ["export", GOOD, "--format", "kohya-lora", "--output", LONG],
        ["compress", LONG, "--rank", "1", "--output", NEW],
        ["compress", GOOD, "--rank", "1", "--output", LONG],
        ["sample", "--model", LONG, "--prompt", "a", "--output", "new.png"],
        ["train", "--model", LONG, "--images", PICTURES, "--class-noun", "cat"],
        ["train", "--model", "a", "--images", LONG, "--class-noun", "cat"],
        ["retrieve", "--collection", LONG, "--class-noun", "a", "--clip-weights", "a"]
        + ["--output", "b"],
        ["jobs", "list", LONG],
        ["jobs", "show", ".", LONG],
    ],
    ids=lambda command: " ".join(command)[:60],
)
def test_a_name_that_is_too_long_is_an_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / GOOD).write_bytes(concept())
    Path(PICTURES).mkdir()
    Image.new("RGB", (64, 64)).save(Path(PICTURES, "a.png"))
    Path(PICTURES, "a.txt").write_text("<new1> cat")
    assert main(command) == 1
    *notes, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and all(note.startswith("note: ") for note in notes)
    assert not os.path.exists(NEW)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_is_none_is_missing(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no file can be called that"):
        open_regular(Path(name))


def test_a_folder_inside_that_nobody_may_look_at_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root user may look at everything, so that the system's answer is played."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "10_secret").mkdir()
    real = os.stat

    def refuse(path: object, *args: object, **kwargs: object) -> os.stat_result:
        if str(path).endswith("10_secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", refuse)
    assert len(load_folder(tmp_path, "a cat")) == 1


def test_the_current_folder_can_be_a_collection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat")
    monkeypatch.chdir(tmp_path)
    assert [entry.caption for part in parts_of(Path(".")) for entry in part.entries()] == ["a cat"]


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_concept_can_be_saved_where_names_are_no_text(tmp_path: Path) -> None:
    (tmp_path / GOOD).write_bytes(concept())
    saved = tmp_path / os.fsdecode(b"folder-\xff") / os.fsdecode(b"concept-\xff.safetensors")
    assert main(["import", str(tmp_path / GOOD), "--output", str(saved)]) == 0
    assert read_concept(saved).tokens[0].name == "<new1>"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_that_lacks_letters_still_shows_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    (tmp_path / "猫.safetensors").write_bytes(concept())
    terminal = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr("sys.stdout", terminal)
    assert main(["list", str(tmp_path)]) == 0
    terminal.flush()
    shown = terminal.buffer.getvalue()  # type: ignore[attr-defined]
    assert ("猫" if encoding == "utf-8" else r"\u732b") in shown.decode(encoding)


def test_json_for_a_terminal_is_the_same_json() -> None:
    value = {"\x1b[2J": ["\x9b", "\u202e", "\ud800", "猫\n\x7f", 1 << 63, None, {}]}
    text = json_text(value)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "猫" in text
    assert json.loads(text) == value


@pytest.mark.parametrize("number", [(1 << 64) - 1, (1 << 63) - 1, -(1 << 63), 10**18, 0])
def test_whole_numbers_of_64_bits_are_read_as_they_are(number: int) -> None:
    """Seeds have so many."""
    assert read_json(str(number)) == number


@pytest.mark.parametrize("number", [1 << 64, -(1 << 63) - 1, 10**400])
def test_larger_whole_numbers_are_null(number: int) -> None:
    assert read_json(str(number)) is None
