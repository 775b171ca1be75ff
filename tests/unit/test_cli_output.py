"""Where a command's result goes is tried before anything is made, and a result is never thrown
away because its place has gone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from custom_diffusion.cli import main
from custom_diffusion.cli.output import save_at_any_rate
from custom_diffusion.concept.errors import ConceptFileError
from custom_diffusion.concept.file import read_concept, write_concept
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.trainer import teach
from support.concepts import random_concept
from support.graphs import draw_pictures
from support.tiny_models import tiny_pipeline

QUICK = ["--steps", "2", "--batch-size", "2", "--resolution", "64", "--device", "cpu"]


def under_a_file(folder: Path) -> Path:
    (folder / "file").write_text("a file")
    return folder / "file" / "deeper" / "cat.safetensors"


def too_long(folder: Path) -> Path:
    return folder / f"{'c' * 300}.safetensors"


@pytest.mark.parametrize(
    ("place", "cause"),
    [
        (under_a_file, "file is no folder: move it away"),
        (too_long, "The name has 312 bytes: choose a shorter one"),
        (lambda folder: folder / "long" / ("d" * 300) / "cat.safetensors", "File name too long"),
    ],
)
@pytest.mark.parametrize("command", ["train", "merge"])
def test_a_place_that_cannot_be_written_is_told_before_anything_else(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    place: Callable[[Path], Path],
    cause: str,
    command: str,
) -> None:
    """The model and the pictures are not there either: they would be told next."""
    arguments = {
        "train": ["--images", str(tmp_path / "none"), "--class-noun", "cat"],
        "merge": [str(tmp_path / "one"), str(tmp_path / "two")],
    }[command]
    model = ["--model", str(tmp_path / "none"), "--output", str(place(tmp_path))]
    assert main([command, *arguments, *model]) == 1
    message = capsys.readouterr().err
    assert cause in message and "Free some space" not in message


def test_the_name_of_the_whole_unet_is_tried_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / f"{'c' * (255 - len('.safetensors'))}.safetensors"
    train = [
        "train",
        "--model",
        "none",
        "--images",
        str(tmp_path),
        "--class-noun",
        "cat",
        "--output",
        str(output),
    ]
    assert main([*train, "--method", "dreambooth"]) == 1
    assert "The name has 260 bytes: choose a shorter one" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_trying_a_place_leaves_nothing_there(tmp_path: Path) -> None:
    output = tmp_path / "new" / "cat.safetensors"
    train = ["train", "--model", "none", "--images", str(tmp_path / "none"), "--class-noun", "cat"]
    assert main([*train, "--output", str(output)]) == 1
    assert list(output.parent.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["custom diffusion", "dreambooth"])
def test_a_training_whose_place_has_gone_is_saved_elsewhere_and_that_is_said(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    model, photos, out, working = (tmp_path / n for n in ("model", "photos", "out", "working"))
    for folder in (photos, working):
        folder.mkdir()
    tiny_pipeline().save_pretrained(model)
    draw_pictures(photos)
    monkeypatch.chdir(working)
    train = teach.train

    def train_and_lose_the_folder(*given: Any, **options: Any) -> Any:
        learnt = train(*given, **options)
        shutil.rmtree(out)
        out.write_text("a file is there now")
        return learnt

    monkeypatch.setattr(teach, "train", train_and_lose_the_folder)
    command = ["train", "--model", str(model), "--images", str(photos), "--class-noun", "cat"]
    output = str(out / "cat.safetensors")
    assert main([*command, "--method", method, "--output", output, *QUICK]) == 1
    message = capsys.readouterr().err
    assert f"{out} is no folder" in message
    (saved,) = working.glob("rescued-????????.safetensors")
    assert f"The result is saved as {saved}" in message
    assert read_concept(saved).provenance["steps"] == 2
    whole = saved.with_name(f"{saved.stem}-unet.safetensors")
    assert whole.is_file() == (method == "dreambooth")


def test_a_place_beside_is_tried_first_and_without_any_the_cause_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    concept = random_concept(family=FAMILIES["sd15"])

    def write(path: Path) -> None:
        write_concept(concept, path)

    with pytest.raises(ConceptFileError, match=r"choose a shorter one.* is saved as .*rescued-"):
        save_at_any_rate(write, too_long(tmp_path))
    (saved,) = tmp_path.iterdir()
    assert read_concept(saved).layers == concept.layers

    nowhere = under_a_file(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(nowhere))
    monkeypatch.setattr(Path, "cwd", lambda: nowhere)
    with pytest.raises(ConceptFileError, match="is no folder") as caught:
        save_at_any_rate(write, nowhere)
    assert "saved as" not in str(caught.value)
