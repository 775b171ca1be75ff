"""Plots: lines are where their data say, and the spectrum plot shows what was cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from custom_diffusion.compression.ranks import compress
from custom_diffusion.compression.spectrum_plot import spectrum_plot
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.delta import DenseDelta
from custom_diffusion.pictures.plot import COLOURS, Axis, Series, line_plot
from numpy.typing import NDArray
from PIL import Image, ImageColor
from support.concepts import KEY, VALUE, narrow_family, random_concept

Pixels = NDArray[np.int64]
"""(n, 2): x and y"""


def pixels(picture: Image.Image, colour: str) -> Pixels:
    """Where the picture has the colour, to a little."""
    difference = np.array(picture).astype(int) - ImageColor.getrgb(colour)
    rows, columns = np.nonzero(np.abs(difference).max(-1) < 12)
    return np.stack([columns, rows], 1)


def corner(found: Pixels) -> tuple[float, ...]:
    return tuple(found.mean(0))


def dots(points: list[tuple[float, float]], x: Axis, y: Axis) -> list[tuple[float, ...]]:
    """Where the dots of a plot lie; each in a colour of its own, without lines or legend."""
    series = [
        Series("", [], "#000000"),
        *(Series("", [], COLOURS[i], marks=[point]) for i, point in enumerate(points)),
    ]
    picture = line_plot("", x, y, series)
    legend = picture.width - 110
    places = []
    for colour, _ in zip(COLOURS, points, strict=False):
        found = pixels(picture, colour)
        places.append(corner(found[found[:, 0] < legend]))
    return places


class TestLinePlot:
    @pytest.mark.parametrize("log", [False, True])
    def test_places_follow_the_values(self, log: bool) -> None:
        """Three values at equal steps, or equal factors: equal distances."""
        values = [1.0, 10.0, 100.0] if log else [1.0, 2.0, 3.0]
        axis = Axis("", log=log)
        low, middle, high = dots([(value, value) for value in values], axis, axis)
        assert low[0] < middle[0] < high[0] and low[1] > middle[1] > high[1]
        for side in (0, 1):
            assert middle[side] == pytest.approx((low[side] + high[side]) / 2, abs=1)

    def test_the_ends_of_an_axis_can_be_given(self) -> None:
        free = dots([(0.0, 4.0), (1.0, 8.0)], Axis(""), Axis(""))
        held = dots([(0.0, 4.0), (1.0, 8.0)], Axis(""), Axis("", low=0, high=8))
        top, bottom = free[1][1], free[0][1]
        assert held[1][1] == pytest.approx(top, abs=1)
        assert held[0][1] == pytest.approx((top + bottom) / 2, abs=1)

    def test_a_line_joins_its_points_and_a_dashed_one_has_gaps(self) -> None:
        points = [(0.0, 0.0), (1.0, 1.0)]
        counts = []
        for dashed in (False, True):
            picture = line_plot("", Axis(""), Axis(""), [Series("", points, dashed=dashed)])
            counts.append(len(set(pixels(picture, COLOURS[0])[:, 0].tolist())))
        assert counts[1] < 0.8 * counts[0]
        assert counts[0] > picture.width / 2

    def test_what_an_axis_cannot_show_is_left_out(self) -> None:
        points = [(0.0, 1.0), (1.0, float("nan")), (1.0, 1.0), (10.0, 2.0)]
        shown = line_plot("", Axis("", log=True), Axis(""), [Series("a", points)])
        rest = line_plot("", Axis("", log=True), Axis(""), [Series("a", points[2:])])
        assert shown.tobytes() == rest.tobytes()
        with pytest.raises(ValueError, match="no point"):
            line_plot("empty", Axis("", log=True), Axis(""), [Series("a", points[:1])])

    @pytest.mark.parametrize(
        ("low", "high", "log", "count"),
        [(0, 1, False, 6), (0, 7, False, 5), (-3, 3, False, 4), (1, 1000, True, 4)],
    )
    def test_there_are_lines_at_round_values(
        self, low: float, high: float, log: bool, count: int
    ) -> None:
        series = [Series("", [(0.0, low), (1.0, high)], "#ffffff")]
        picture = line_plot("", Axis(""), Axis("", log=log), series)
        rows = pixels(picture, "#dddfe3")
        full = [y for y in set(rows[:, 1].tolist()) if (rows[:, 1] == y).sum() > 500]
        lines = [y for y in full if y - 1 not in full]
        assert count - 1 <= len(lines) <= count + 3

    def test_one_value_alone_can_be_shown(self) -> None:
        for log in (False, True):
            axis = Axis("", log=log)
            picture = line_plot("", axis, axis, [Series("a", [], marks=[(1.0, 1.0)])])
            assert len(pixels(picture, COLOURS[0])) > 50

    def test_dark_ground_has_light_text(self) -> None:
        series = [Series("a", [(0.0, 0.0), (1.0, 1.0)])]
        light, dark = (
            np.array(line_plot("title", Axis(""), Axis(""), series, dark=dark))
            for dark in (False, True)
        )
        assert np.median(light) > 200 > 100 > np.median(dark)
        assert light.shape == dark.shape == (800, 1360, 3)


class TestSpectrumPlot:
    def test_a_line_is_the_running_share_of_its_layers(self) -> None:
        """A layer with equal singular values rises to half at half of its rank."""
        half, all_of_it = torch.zeros(24, 64), torch.zeros(24, 64)
        half[0, 0] = half[1, 1] = half[2, 2] = half[3, 3] = 1.0
        all_of_it[0, 0] = 1.0
        deltas = {KEY: DenseDelta(half), VALUE: DenseDelta(all_of_it)}
        concept = Concept(narrow_family(), deltas)
        marked = spectrum_plot(concept, ranks={KEY: 2, VALUE: 0})
        plain = spectrum_plot(concept, ranks={KEY: 0, VALUE: 0})
        changed = np.argwhere(np.array(marked) != np.array(plain))[:, :2]
        top, bottom = 2 * 64, 800 - 2 * 48
        assert changed[:, 0].mean() == pytest.approx((top + bottom) / 2, abs=3)

    def test_known_singular_values_are_not_computed_again(self) -> None:
        concept = random_concept()
        _, report = compress(concept, rank=3)
        known = spectrum_plot(concept, report.spectra)
        difference = np.array(known).astype(int) - np.array(spectrum_plot(concept))
        assert np.abs(difference).mean() < 0.1
        other = {layer: values**4 for layer, values in report.spectra.items()}
        assert spectrum_plot(concept, other).tobytes() != known.tobytes()

    def test_a_merged_concept_and_its_dots(self) -> None:
        concept = random_concept(rank=12)
        _, report = compress(concept, rank=4)
        picture = spectrum_plot(concept, report.spectra, report.ranks(), dark=True)
        assert len(pixels(picture, COLOURS[0])) > 100

    def test_nothing_to_show_is_an_error(self) -> None:
        with pytest.raises(ValueError):
            spectrum_plot(replace(random_concept(), deltas={}))
