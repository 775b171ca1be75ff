"""Random resize: how often, how large, with which words, and where the loss may look."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from custom_diffusion.trainer.config import Framing
from custom_diffusion.trainer.data.augmentation import (
    LARGE_PREFIXES,
    SMALL_PREFIXES,
    View,
    _random_edge,
    random_view,
    whole_view,
)
from custom_diffusion.trainer.data.captioned import Picture
from PIL import Image, ImageDraw

WHITE = Image.new("RGB", (24, 24), "white")


def whole(image: Image.Image, size: int, flip: bool = False, fit: Framing = "crop") -> View:
    return whole_view(Picture(image), (size, size), flip, fit)


def views(
    size: int,
    count: int,
    image: Image.Image = WHITE,
    *,
    seed: int = 0,
    flip: bool = False,
    fit: Framing = "crop",
) -> list[View]:
    rng = random.Random(seed)
    return [random_view(Picture(image), (size, size), rng, flip, fit) for _ in range(count)]


def small_views(size: int, count: int, image: Image.Image = WHITE) -> list[View]:
    return [view for view in views(size, count, image) if view.prefix in SMALL_PREFIXES]


def large_views(size: int, count: int, image: Image.Image = WHITE) -> list[View]:
    return [view for view in views(size, count, image) if view.prefix in LARGE_PREFIXES]


def box_of(view: View) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the white picture that was pasted on grey."""
    rows, columns = np.nonzero(view.image_chw[0].numpy() > 0.5)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def red_disc(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    x, y = width // 2, height // 2
    ImageDraw.Draw(image).ellipse((x - 60, y - 60, x + 60, y + 60), fill="red")
    return image


def disc_extent(view: View) -> tuple[int, int]:
    """Width and height of the red disc in a view."""
    red = (view.image_chw[0] > 0.5) & (view.image_chw[1] < -0.5)
    rows, columns = np.nonzero(red.numpy())
    return int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1


def red_left_blue_right() -> Image.Image:
    image = Image.new("RGB", (64, 64), "red")
    image.paste("blue", (32, 0, 64, 64))
    return image


def test_kinds_of_view_come_with_the_frequencies_of_the_reference() -> None:
    rng = random.Random(0)
    edges = [_random_edge(512, rng) for _ in range(30_000)]
    kinds = Counter("small" if e < 0.6 * 512 else "large" if e > 512 else "whole" for e in edges)
    assert kinds["small"] / len(edges) == pytest.approx(0.266, abs=0.01)
    assert kinds["whole"] / len(edges) == pytest.approx(0.400, abs=0.01)
    assert kinds["large"] / len(edges) == pytest.approx(0.333, abs=0.01)


def test_views_carry_the_words_of_their_kind_equally_often() -> None:
    drawn = Counter(view.prefix for view in views(64, 3000))
    small, large = 18 / 44 * 2 / 3, 1 / 3  # edges 21..38 of 21..64 are below 0.6 of 64
    for prefix in SMALL_PREFIXES:
        assert drawn[prefix] / 3000 == pytest.approx(small / 2, abs=0.025)
    for prefix in LARGE_PREFIXES:
        assert drawn[prefix] / 3000 == pytest.approx(large / 2, abs=0.025)
    assert drawn[""] / 3000 == pytest.approx(1 - small - large, abs=0.03)
    assert set(drawn) == {*SMALL_PREFIXES, *LARGE_PREFIXES, ""}


def test_edges_are_even_and_inside_the_ranges_of_the_reference() -> None:
    rng = random.Random(0)
    edges = {_random_edge(512, rng) for _ in range(30_000)}
    assert all(edge % 2 == 0 for edge in edges)
    assert min(edges) == 170
    assert max(edges) == 716
    assert max(edge for edge in edges if edge <= 512) == 512
    assert min(edge for edge in edges if edge > 512) == 614


@pytest.mark.parametrize("size", [64, 128, 512])
def test_mask_of_a_small_view_is_its_box_less_one_latent_cell_a_side(size: int) -> None:
    found = small_views(size, 120 if size < 512 else 20)
    assert found
    for view in found:
        left, top, right, bottom = box_of(view)
        wanted = torch.zeros(size // 8, size // 8)
        rows = slice(top // 8 + 1, max(bottom // 8 - 1, top // 8 + 2))
        columns = slice(left // 8 + 1, max(right // 8 - 1, left // 8 + 2))
        wanted[rows, columns] = 1
        assert torch.equal(view.mask, wanted)


@pytest.mark.parametrize("size", [48, 64, 128])
def test_every_valid_cell_of_a_small_view_lies_inside_the_pasted_picture(size: int) -> None:
    for view in small_views(size, 300):
        pixels = view.mask.repeat_interleave(8, 0).repeat_interleave(8, 1).bool()
        assert (view.image_chw[:, pixels] > 0.9).all()


def test_small_pictures_come_in_the_size_that_was_drawn_and_anywhere() -> None:
    boxes = [box_of(view) for view in small_views(128, 300)]
    sizes = {(right - left, bottom - top) for left, top, right, bottom in boxes}
    assert all(width == height and 42 <= width < 0.6 * 128 for width, height in sizes)
    assert len({box[0] for box in boxes}) > 20
    assert len({box[1] for box in boxes}) > 20


def test_grey_around_a_small_view_is_zero() -> None:
    for view in small_views(64, 60):
        left, top, right, bottom = box_of(view)
        grey = torch.ones(64, 64, dtype=torch.bool)
        grey[top:bottom, left:right] = False
        assert view.image_chw[:, grey].abs().max() <= 1 / 255 + 1e-6


def test_whole_and_large_views_count_everywhere_and_have_no_grey() -> None:
    for view in views(64, 200):
        if view.prefix not in SMALL_PREFIXES:
            assert view.mask.equal(torch.ones(8, 8))
            assert (view.image_chw > 0.99).all()


def test_large_views_show_a_part_of_the_picture_at_1_2_to_1_4_of_its_size() -> None:
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1))).convert("RGB")
    shown = []
    for view in large_views(128, 300, ramp):
        row = view.image_chw[0, 64]
        shown.append(float(row.max() - row.min()) / 2)
    assert 1 / 1.42 <= min(shown) < 1 / 1.35
    assert 1 / 1.25 < max(shown) <= 1 / 1.17


def test_views_are_float_pictures_between_minus_one_and_one() -> None:
    noise = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8), "RGB"
    )
    for view in [whole(noise, 64), *views(64, 60, noise)]:
        assert view.image_chw.shape == (3, 64, 64)
        assert view.image_chw.dtype == torch.float32
        assert view.mask.shape == (8, 8)
        assert -1 <= view.image_chw.min() < -0.5 < 0.5 < view.image_chw.max() <= 1


@pytest.mark.parametrize("width, height", [(512, 256), (256, 512), (300, 300), (1000, 128)])
def test_a_disc_stays_round_in_every_view(width: int, height: int) -> None:
    image = red_disc(width, height)
    for view in [whole(image, 128), *small_views(128, 20, image)]:
        across, down = disc_extent(view)
        assert abs(across - down) <= 1


def test_the_centre_of_a_wide_picture_is_shown() -> None:
    image = Image.new("RGB", (300, 100), "black")
    image.paste("white", (100, 0, 200, 100))
    assert (whole(image, 64).image_chw > 0.95).all()


@pytest.mark.parametrize("width, height", [(300, 100), (100, 300)])
def test_a_letterbox_shows_all_of_a_picture_and_counts_inside_it(width: int, height: int) -> None:
    image = red_disc(width, height)
    view = whole(image, 96, fit="letterbox")
    middle = slice(32, 64)  # a third of the view
    box = (slice(None), middle) if width > height else (slice(None), slice(None), middle)
    bars = view.image_chw.clone()
    bars[box] = 0
    assert bars.abs().max() <= 1 / 255 + 1e-6
    assert view.image_chw[box][2].max() > 0.99, "the white of the picture"
    wanted = torch.zeros(12, 12)
    wanted[5:7] = 1  # cells 4..7 show the picture; the outer ones see the bars
    assert torch.equal(view.mask, wanted if width > height else wanted.T)


def test_views_of_a_letterbox_count_only_inside_the_picture() -> None:
    for view in views(128, 200, Image.new("RGB", (64, 32), "white"), fit="letterbox"):
        pixels = view.mask.repeat_interleave(8, 0).repeat_interleave(8, 1).bool()
        assert pixels.any()
        assert (view.image_chw[:, pixels] > 0.9).all()


def test_a_mask_goes_where_its_picture_goes() -> None:
    """The mask is the picture's own brightness, so that each view can be held against its mask."""
    shades = Image.new("L", (96, 64))
    ImageDraw.Draw(shades).ellipse((30, 10, 70, 50), fill=255)
    picture = Picture(shades.convert("RGB"), shades)
    rng = random.Random(0)
    for fit in ("crop", "letterbox"):
        for number in range(100):
            view = random_view(picture, (128, 128), rng, flip=number % 2 == 1, fit=fit)
            shown = torch.nn.functional.avg_pool2d(view.image_chw[:1] / 2 + 0.5, 8)[0]
            counted = view.mask > 0
            assert counted.sum() >= 1
            assert (view.mask - shown)[counted].abs().max() < 0.08


def test_a_close_up_that_misses_what_counts_gives_way_to_the_whole() -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 9, 9))
    picture, rng = Picture(Image.new("RGB", (64, 64), "white"), mask), random.Random(0)
    drawn = [random_view(picture, (128, 128), rng) for _ in range(300)]
    assert all(view.mask.sum() >= 1 for view in drawn)
    assert 0 < sum(view.prefix in LARGE_PREFIXES for view in drawn) < 60


def test_flipping_mirrors_left_and_right_only() -> None:
    noise = Image.fromarray(
        np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8), "RGB"
    )
    plain, flipped = whole(noise, 64), whole(noise, 64, flip=True)
    assert torch.equal(flipped.image_chw, plain.image_chw.flip(-1))
    assert not torch.equal(flipped.image_chw, plain.image_chw)


def test_every_kind_of_view_can_be_flipped() -> None:
    for flip in (False, True):
        for view in views(64, 60, red_left_blue_right(), flip=flip):
            redness = (view.image_chw[0] - view.image_chw[2]).sum(0)  # of each column
            assert bool(redness[redness.abs() > 0.1][0] > 0) is not flip


@pytest.mark.parametrize("size", [32, 40, 48, 64, 72, 128])
def test_the_loss_always_sees_at_least_one_cell(size: int) -> None:
    for view in views(size, 500):
        assert view.mask.shape == (size // 8, size // 8)
        assert view.mask.sum() >= 1


def test_the_same_generator_draws_the_same_views() -> None:
    image = red_disc(200, 150)
    for one, other in zip(views(64, 20, image, seed=5), views(64, 20, image, seed=5), strict=True):
        assert torch.equal(one.image_chw, other.image_chw)
        assert torch.equal(one.mask, other.mask)
        assert one.prefix == other.prefix
    prefixes = [[view.prefix for view in views(64, 20, seed=seed)] for seed in (5, 6)]
    assert prefixes[0] != prefixes[1]


def test_drawing_views_leaves_the_global_generators_alone() -> None:
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    views(64, 10)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert (np.random.get_state()[1] == before[2]).all()


# Where a view comes from


def ramp(width: int, height: int) -> Image.Image:
    """The red of a pixel says how far to the right it is, the green how far down."""
    right = np.tile(np.linspace(0, 255, width), (height, 1))
    down = np.tile(np.linspace(0, 255, height)[:, None], (1, width))
    return Image.fromarray(np.stack([right, down, right * 0], -1).round().astype(np.uint8))


@pytest.mark.parametrize("shape", [(256, 256), (384, 256), (256, 384), (90, 60)])
@pytest.mark.parametrize("fit", ["crop", "letterbox"])
def test_the_crop_is_where_the_first_pixel_was_in_the_resized_picture(
    shape: tuple[int, int], fit: Framing
) -> None:
    for view in views(128, 40, ramp(*shape), fit=fit):
        height, width, top, left, seen_height, seen_width = view.sizes
        assert (width, height) == shape
        assert (seen_height, seen_width) == (128, 128)
        if view.prefix in SMALL_PREFIXES:
            assert (top, left) == (0, 0)
            continue
        # The slope of the ramp says how large the picture was when it was cropped.
        picture = (view.image_chw.numpy() + 1) * 127.5
        if fit == "crop":
            for place, channel, axis in ((left, 0, 1), (top, 1, 0)):
                along = picture[channel].mean(1 - axis)
                slope, first = np.polyfit(np.arange(128), along, 1)
                assert first / slope == pytest.approx(place, abs=1.5)
        else:
            assert 0 <= top <= 52 and 0 <= left <= 52
            assert (top, left) == (0, 0) or view.prefix in LARGE_PREFIXES


def test_a_whole_square_picture_is_not_cropped() -> None:
    assert whole_view(Picture(ramp(256, 256)), (128, 128)).sizes == (256, 256, 0, 0, 128, 128)
    assert whole_view(Picture(ramp(384, 256)), (128, 128)).sizes == (256, 384, 0, 32, 128, 128)
    assert whole_view(Picture(ramp(384, 256)), (128, 128), fit="letterbox").sizes[2:4] == (0, 0)
