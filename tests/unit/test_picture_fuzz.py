"""Thousands of pictures that are broken somewhere: each opens, or is refused under its name."""

from __future__ import annotations

from pathlib import Path

import pytest
from custom_diffusion.concept.errors import DataError
from custom_diffusion.trainer.data.captioned import CaptionedImage
from support.mutants import mutants


@pytest.mark.filterwarnings("ignore")
def test_broken_pictures_open_or_are_named(tmp_path: Path) -> None:
    opened = refused = 0
    path = tmp_path / "the picture"
    for content in mutants(3000):
        path.write_bytes(content)
        try:
            picture = CaptionedImage(path, "a cat", mask=None).open()
        except DataError as error:
            refused += 1
            assert "the picture" in str(error)
        else:
            opened += 1
            assert picture.image.mode == "RGB"
    assert opened > 500
    assert refused > 500
