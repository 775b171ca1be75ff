"""A regularization set that the model draws: kept, gone on with, and never mixed up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from custom_diffusion.concept.errors import ConceptFileError, ConfigError, DataError
from custom_diffusion.pictures.kept import SETTINGS_FILE, settings_hash
from custom_diffusion.trainer.data.folders import load_folder
from custom_diffusion.trainer.regularization.drawn import generated_set
from PIL import Image
from torch import Tensor

CAPTION = "photo of a cat"
SETTINGS = {"model": "abc", "seed": 3}


class Painter:
    """Draws picture n in the shade n, and remembers what it was asked for."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.asked: list[list[int]] = []
        self._stop_at = stop_at

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        if self._stop_at in numbers:
            raise KeyboardInterrupt
        self.asked.append(list(numbers))
        return torch.stack([torch.full((8, 8, 3), number / 255) for number in numbers])


def shades(folder: Path) -> list[int]:
    return [Image.open(path).getpixel((0, 0))[0] for path in sorted(folder.glob("*.png"))]


def test_pictures_are_numbered_captioned_and_a_folder_as_any_other(tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    drawn = generated_set(
        tmp_path / "set",
        SETTINGS,
        CAPTION,
        5,
        Painter(),
        batch_size=2,
        on_progress=lambda *counts: done.append(counts),
    )
    assert shades(tmp_path / "set") == [0, 1, 2, 3, 4]
    assert done == [(0, 5), (2, 5), (4, 5), (5, 5)]
    assert load_folder(tmp_path / "set", "") == drawn
    assert {image.caption for image in drawn} == {CAPTION}


def test_an_interrupted_set_goes_on_and_a_finished_one_is_drawn_no_more(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        generated_set(tmp_path, SETTINGS, CAPTION, 5, Painter(stop_at=3), batch_size=2)
    assert shades(tmp_path) == [0, 1]
    assert not list(tmp_path.glob("*.tmp"))
    (tmp_path / "00000.png").unlink()

    painter = Painter()
    generated_set(tmp_path, SETTINGS, CAPTION, 5, painter, batch_size=2)
    assert painter.asked == [[0, 2], [3, 4]]
    assert shades(tmp_path) == [0, 1, 2, 3, 4]

    assert len(generated_set(tmp_path, SETTINGS, CAPTION, 3, painter)) == 3
    assert len(generated_set(tmp_path, SETTINGS, CAPTION, 6, painter)) == 6
    assert painter.asked[2:] == [[5]], "only what a larger set lacks"


@pytest.mark.parametrize("changed", [{"seed": 4}, {"model": "def"}, {"more": 1}])
def test_pictures_of_other_settings_are_refused_and_kept(
    tmp_path: Path, changed: dict[str, object]
) -> None:
    generated_set(tmp_path, SETTINGS, CAPTION, 1, Painter())
    painter = Painter()
    with pytest.raises(DataError, match="other settings") as caught:
        generated_set(tmp_path, {**SETTINGS, **changed}, CAPTION, 2, painter)
    assert str(tmp_path) in str(caught.value) and SETTINGS_FILE in str(caught.value)
    with pytest.raises(DataError, match="other settings"):
        generated_set(tmp_path, SETTINGS, "photo of a dog", 2, painter)
    assert painter.asked == []
    assert shades(tmp_path) == [0]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(DataError, match="not made here"):
        generated_set(tmp_path, SETTINGS, CAPTION, 1, Painter())
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_path_that_is_a_file_and_numbers_below_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConceptFileError, match="file"):
        generated_set(tmp_path / "file", SETTINGS, CAPTION, 1, Painter())
    for count, batch_size in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            generated_set(
                tmp_path / "set", SETTINGS, CAPTION, count, Painter(), batch_size=batch_size
            )
    assert not (tmp_path / "set").exists()


def test_the_name_of_settings_depends_on_every_value_and_not_on_their_order() -> None:
    name = settings_hash({"a": 1, "b": 2})
    assert name == settings_hash({"b": 2, "a": 1}) != settings_hash({"a": 1, "b": 3})
    assert name.isalnum()
