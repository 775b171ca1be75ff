"""The contact sheet shows the views that the run will encode, and what of them counts."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from custom_diffusion.concept.errors import DataError
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.data.advice import advice
from custom_diffusion.trainer.data.captioned import CaptionedImage
from custom_diffusion.trainer.data.contact_sheet import PictureSheet, contact_sheet
from custom_diffusion.trainer.data.latents import encode_views
from custom_diffusion.trainer.data.mixing import mixed_views
from custom_diffusion.trainer.data.training_concept import TrainingConcept
from PIL import Image, ImageChops
from torch import Tensor

TILE, GAP, LABEL, ROW = 160, 6, 330, 160 + 6 + 46


class SeenViews:
    """A latent encoder that keeps the pictures it is given, once each."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def moments(self, image_chw: Tensor) -> tuple[Tensor, Tensor]:
        self.images.append(image_chw)
        return torch.full((4, 16, 16), len(self.images) - 1.0), torch.zeros(4, 16, 16)


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((240, 160), Image.Resampling.NEAREST)


def concept(masks: bool = False) -> TrainingConcept:
    mask = Image.new("L", (240, 160))
    mask.paste(255, (40, 0, 120, 160))
    return TrainingConcept(
        images=tuple(
            CaptionedImage(noise(seed), "a <new1> cat", mask if masks else None)
            for seed in range(2)
        ),
        class_noun="cat",
        token="<new1>",
        regularization=(CaptionedImage(noise(9), "a cat"),),
    )


def picture_sheet(concept: TrainingConcept) -> Image.Image:
    sheet = PictureSheet(concept)
    list(advice(concept, sheet.add))
    return sheet.draw()


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"resolution": 128, "views_per_image": 10, **changes})


def test_pictures_as_given_are_shown_whole_and_dark_where_they_do_not_count() -> None:
    plain, masked = (
        np.asarray(picture_sheet(concept(masks)), dtype=float) for masks in (False, True)
    )
    # 240 x 160 pixels in a square tile without a label: 106 rows of it in the middle, white around.
    assert (plain[GAP : GAP + 25, :TILE] == 255).all()
    picture = slice(GAP + 30, GAP + 130)
    assert np.allclose(masked[picture, :20], 0.25 * plain[picture, :20], atol=2)
    assert np.allclose(masked[picture, 32:75], plain[picture, 32:75], atol=2)


def tile(sheet: Image.Image, row: int, column: int) -> np.ndarray:
    left, top = LABEL + column * (TILE + GAP), GAP + row * ROW
    return np.asarray(sheet.crop((left, top, left + TILE, top + TILE)), dtype=float)


@pytest.mark.parametrize("augment", [True, False])
def test_the_sheet_shows_what_is_encoded(augment: bool) -> None:
    config = settings(augment=augment)
    seen = SeenViews()
    bank = encode_views(concept(), seen, config)
    sheet = contact_sheet(concept(), config)
    shown = 0
    for row, column in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]:
        view = bank.instances[row][column] if row < 2 else bank.regularization[0]
        if view.mask.min() < 1:
            continue  # partly dark
        shown += 1
        encoded = seen.images[int(view.mean[0, 0, 0])]
        image = ((encoded / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
        wanted = np.asarray(Image.fromarray(image).resize((TILE, TILE)), dtype=float)
        assert np.abs(tile(sheet, row, column) - wanted).max() <= 1
    assert shown > 1


def test_more_pictures_than_a_screen_has_room_for_are_counted() -> None:
    """The sheets of a thousand pictures would fill the memory."""
    many = replace(concept(), images=concept().images * 200)
    views = contact_sheet(many, settings(augment=False, flip=False))
    few = contact_sheet(replace(many, images=many.images[:32]), settings(augment=False, flip=False))
    more = np.asarray(views)[few.height - ROW : few.height - ROW + TILE, :LABEL]
    assert views.height == few.height + TILE + GAP
    assert more.min() < 100  # "368 more pictures are not shown"
    assert picture_sheet(many).height == 32 * ROW + TILE + 2 * GAP


def test_a_picture_with_repeats_is_shown_once_and_said_to_come_more_often() -> None:
    once = concept()
    often = replace(once, images=(replace(once.images[0], repeats=10), *once.images[1:]))
    plain, repeated = (contact_sheet(taught, settings()) for taught in (once, often))
    assert repeated.size == plain.size
    changed = ImageChops.difference(plain, repeated).getbbox()
    assert changed is not None
    assert changed[2] <= LABEL and changed[3] <= GAP + ROW  # words beside the first picture


def test_what_does_not_count_is_dark() -> None:
    bright, masked = (
        contact_sheet(concept(masks), settings(augment=False)) for masks in (False, True)
    )
    whole, part = tile(bright, 0, 0), tile(masked, 0, 0)
    middle = slice(0, 78)  # the left half of the middle square is masked in
    assert np.abs(whole[:, middle] - part[:, middle]).max() < 3
    assert np.abs(0.25 * whole[:, 84:] - part[:, 84:]).max() < 3


def test_a_sheet_refuses_what_the_run_would_refuse() -> None:
    outside = Image.new("L", (240, 160))
    outside.paste(255, (0, 0, 30, 160))  # left of the middle square
    taught = TrainingConcept((CaptionedImage(noise(0), "a <new1> cat", outside),), "cat", "<new1>")
    for refuse in (contact_sheet, lambda c, s: encode_views(c, SeenViews(), s)):
        with pytest.raises(DataError, match="less than 8 x 8 pixels to learn in the middle square"):
            refuse(taught, settings(fit="crop"))
    contact_sheet(taught, settings(fit="letterbox"))
    long = TrainingConcept(
        (CaptionedImage(Image.new("RGB", (500, 100)), "a <new1> cat"),), "cat", "<new1>"
    )
    with pytest.raises(DataError, match="500 x 100 pixels, too long for a letterbox"):
        contact_sheet(long, settings(fit="letterbox"))


def test_pictures_are_opened_once_for_the_sheet_and_the_advice(tmp_path: Path) -> None:
    files = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, file in enumerate(files):
        noise(seed).save(file)
    shown = TrainingConcept(
        tuple(CaptionedImage(one, "a <new1> cat") for one in files), "cat", "<new1>"
    )
    opened: list[str] = []
    watching = [opened]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:  # hooks stay as long as the process
        if event == "open" and watching:
            watching[0].append(str(arguments[0]))

    sys.addaudithook(watch)
    assert picture_sheet(shown).height > TILE
    watching.clear()
    assert [opened.count(str(file)) for file in files] == [1, 1, 1]


def test_what_is_mixed_with_another_concept_is_shown() -> None:
    mixing = settings(augment=False, flip=False, seg_mix=0.3)
    cat = concept(masks=True)
    dog = replace(
        cat,
        images=tuple(replace(i, caption="a <new2> dog") for i in cat.images),
        class_noun="dog",
        token="<new2>",
    )
    alone, both = contact_sheet(cat, mixing), contact_sheet(cat, mixing, dog)
    assert both.height == alone.height + ROW
    for column, one in enumerate(mixed_views(cat, dog, mixing, 8, [(128, 128)])):
        wanted = ((one.view.image_chw + 1) * 127.5).mean(0).numpy()
        small = np.asarray(Image.fromarray(wanted).resize((TILE, TILE)))
        counts = one.view.mask.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()
        whole = np.asarray(Image.fromarray((counts > 0.99).astype(np.float32)).resize((TILE, TILE)))
        seen = tile(both, 2, column).mean(-1)
        assert np.abs(seen - small)[whole == 1].mean() < 3
    unmixed = settings(augment=False, flip=False)
    assert contact_sheet(cat, unmixed, dog).height == contact_sheet(cat, unmixed).height
