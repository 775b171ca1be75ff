"""Composed pictures: who is where, what the masks and captions say, and what is left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from custom_diffusion.cli import main
from custom_diffusion.concept.errors import ConfigError, DataError
from custom_diffusion.concept.prompts import STYLE_TEMPLATE
from custom_diffusion.trainer.data.captioned import CaptionedImage
from custom_diffusion.trainer.data.composing import (
    Background,
    Composed,
    compose,
    composed_words,
)
from custom_diffusion.trainer.data.folders import load_folder
from custom_diffusion.trainer.data.training_concept import TrainingConcept
from PIL import Image

EDGE = 128
RED, GREEN, BLUE = (220, 0, 0), (0, 200, 0), (0, 0, 180)
FAR = 60
"""Between colours of two things, summed over the channels; resampling and feathering stay below."""


def subject(colour: tuple[int, int, int], box: tuple[int, int, int, int]) -> CaptionedImage:
    """A thing of one colour on black, and its mask."""
    picture, mask = Image.new("RGB", (100, 80)), Image.new("L", (100, 80))
    picture.paste(colour, box)
    mask.paste(255, box)
    return CaptionedImage(picture, "", mask)


def thing(noun: str, token: str, *images: CaptionedImage) -> TrainingConcept:
    captioned = tuple(replace(image, caption=f"a {token} {noun}") for image in images)
    return TrainingConcept(captioned, noun, token)


CAT = thing("cat", "<new1>", subject(RED, (10, 10, 60, 70)), subject(RED, (50, 5, 95, 30)))
DOG = thing("dog", "<new2>", subject(GREEN, (0, 0, 30, 80)))
SEA = Background(Image.new("RGB", (300, 200), BLUE), "at sea")


def near(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    return np.abs(np.asarray(picture, int) - colour).sum(-1) < FAR


def test_each_subject_is_there_once_and_masks_and_captions_say_where() -> None:
    made = compose([CAT, DOG], [SEA], count=12, edge=EDGE, seed=3)
    assert (made.cut_outs, made.unmasked, made.backgrounds) == ((2, 1), (0, 0), 1)
    places, sizes = set(), set()
    for one in made.pictures:
        opened = one.open()
        assert opened.image.size == opened.mask.size == (EDGE, EDGE)
        mask = np.asarray(opened.mask) > 127
        red, green, blue = (near(opened.image, colour) for colour in (RED, GREEN, BLUE))
        assert red.any() and green.any()
        # Nothing of the pictures that they were cut out of but the subjects themselves.
        assert not near(opened.image, (0, 0, 0)).any()
        assert (
            not (blue & mask).any() and not ((red | green) & ~(np.asarray(opened.mask) > 0)).any()
        )
        assert (mask & (red | green)).sum() > 0.8 * mask.sum()
        across = [np.nonzero(which.any(0))[0] for which in (red, green)]
        cat_is_left = across[0].max() < across[1].min()
        assert cat_is_left or across[1].max() < across[0].min()  # beside, never over each other
        order = "<new1> cat and a <new2> dog" if cat_is_left else "<new2> dog and a <new1> cat"
        assert one.caption == f"photo of a {order}, at sea"
        places.add(cat_is_left)
        sizes.add(int(red.sum()))
    assert places == {True, False} and len(sizes) > 4


def test_the_same_seed_gives_the_same_pictures_and_more_of_them_begin_alike() -> None:
    def content(made: Composed) -> list[tuple[bytes, bytes, str]]:
        opened = [(one.open(), one.caption) for one in made.pictures]
        return [(p.image.tobytes(), p.mask.tobytes(), c) for p, c in opened if p.mask]

    few = content(compose([CAT, DOG], [SEA], 3, EDGE, seed=1))
    more = content(compose([CAT, DOG], [SEA], 6, EDGE, seed=1))
    assert more[:3] == few
    assert content(compose([CAT, DOG], [SEA], 3, EDGE, seed=2)) != few


def test_every_background_and_cut_out_comes_before_any_comes_again() -> None:
    shades = [Background(Image.new("RGB", (64, 64), (0, 0, n * 20))) for n in range(5)]
    made = compose([CAT], shades, 10, EDGE, seed=0)
    corners = [one.open().image.getpixel((0, 0))[2] // 20 for one in made.pictures]
    assert sorted(corners[:5]) == sorted(corners[5:]) == list(range(5))
    assert all(one.caption == "photo of a <new1> cat" for one in made.pictures)


def test_what_has_no_mask_is_left_out_and_counted() -> None:
    plain = CaptionedImage(Image.new("RGB", (50, 50), RED), "a <new1> cat")
    mixed = replace(CAT, images=(*CAT.images, plain))
    made = compose([mixed, DOG], [SEA], 2, EDGE, seed=0)
    assert list(composed_words([mixed, DOG], made)) == [
        "2 pictures of 2 cut-outs of <new1> cat, 1 cut-out of <new2> dog, on 1 background.",
        "Left out because of no mask: 1 picture of <new1> cat.",
    ]
    with pytest.raises(DataError, match="None of the 1 pictures of <new1> cat has a mask"):
        compose([replace(CAT, images=(plain,))], [SEA], 2, EDGE, seed=0)


def test_what_cannot_be_composed_is_said() -> None:
    with pytest.raises(DataError, match="no background"):
        compose([CAT], [], 2, EDGE, seed=0)
    with pytest.raises(DataError, match="style has no outline"):
        compose([replace(CAT, template=STYLE_TEMPLATE)], [SEA], 2, EDGE, seed=0)
    for count, edge in ((0, EDGE), (1001, EDGE), (1, 8)):
        with pytest.raises(ConfigError, match="were asked for"):
            compose([CAT], [SEA], count, edge, seed=0)


def test_the_command_makes_a_folder_that_training_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for noun, concept in (("cat", CAT), ("dog", DOG)):
        (tmp_path / noun).mkdir()
        for number, image in enumerate(concept.images):
            image.source.save(tmp_path / noun / f"{number}.png")
            image.mask.save(tmp_path / noun / f"{number}.mask.png")
    (tmp_path / "places").mkdir()
    SEA.image.save(tmp_path / "places" / "sea.png")
    (tmp_path / "places" / "sea.txt").write_text("at sea")
    folders = [str(tmp_path / noun) for noun in ("cat", "dog")]
    command = ["compose", "--images", *folders, "--class-noun", "cat", "dog", "--count", "3"]
    command += ["--backgrounds", str(tmp_path / "places"), "--resolution", "96"]
    assert main([*command, "--output", str(tmp_path / "both")]) == 0
    assert "3 pictures of 2 cut-outs of <new1> cat" in capsys.readouterr().out
    loaded = load_folder(tmp_path / "both", "no caption")
    assert len(loaded) == 3
    for one in loaded:
        assert "<new1> cat" in one.caption and one.caption.endswith(", at sea")
        assert one.open().image.size == (96, 96) and one.open().mask
    assert main([*command, "--output", str(tmp_path / "both")]) == 1
    assert "exists already" in capsys.readouterr().err
