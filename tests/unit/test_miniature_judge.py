"""The miniature's judge, autoencoder and tables, as far as they need no trained weights: the judge
is given sights made by hand in place of what its recognizer would see.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from math import e
from types import SimpleNamespace

import pytest
import torch
from custom_diffusion.host.diffusers.denoiser import DiffusersLatentEncoder
from custom_diffusion.miniature import judge
from custom_diffusion.miniature.cells import markdown_table
from custom_diffusion.miniature.concepts import concept_look
from custom_diffusion.miniature.judge import COLOR_TOLERANCE, Facts, Said
from custom_diffusion.miniature.model import BlockAutoencoder
from custom_diffusion.miniature.recognizer import Seen
from custom_diffusion.miniature.world import BACKGROUNDS, MARKS, PATTERNS, SHAPES, Look

RED, GREEN, BLUE = (0.86, 0.12, 0.12), (0.15, 0.60, 0.20), (0.15, 0.30, 0.90)
MIDDLE, LEFT, RIGHT, TOP = (0.5, 0.5), (0.2, 0.5), (0.8, 0.5), (0.5, 0.2)
CIRCLE, SQUARE = Look("circle", RED), Look("square", BLUE)
SPLIT = Look("circle", RED, "split", BLUE)


def sight(looks: Sequence[Look], *places: tuple[float, float], background: str = "on snow") -> Seen:
    """One picture, seen perfectly. Where nothing is, all answers are nought."""
    shapes = len(SHAPES)
    seen = Seen(
        presence=torch.zeros(1, shapes),
        place=torch.zeros(1, shapes, 2),
        color=torch.zeros(1, shapes, 3),
        second_color=torch.zeros(1, shapes, 3),
        pattern=torch.zeros(1, shapes, len(PATTERNS)),
        mark=torch.zeros(1, shapes, len(MARKS)),
        count=torch.eye(4)[None, len(looks)],
        background=torch.eye(len(BACKGROUNDS))[None, list(BACKGROUNDS).index(background)],
        features=torch.zeros(1, 128),
    )
    for look, place in zip(looks, places or (MIDDLE, MIDDLE), strict=False):
        shape = SHAPES.index(look.shape)
        seen.presence[0, shape] = 1
        seen.place[0, shape] = torch.tensor(place)
        seen.color[0, shape] = torch.tensor(look.color)
        seen.second_color[0, shape] = torch.tensor(look.second_color)
        seen.pattern[0, shape, PATTERNS.index(look.pattern)] = 1
        seen.mark[0, shape, MARKS.index(look.mark)] = 1
    return seen


@pytest.mark.parametrize(
    "caption, facts",
    [
        ("circle", Facts((Said("circle"),))),
        ("photo of a red circle", Facts((Said("circle", "red", "", "plain"),))),
        ("blue cross in fog", Facts((Said("cross", "blue", "", "plain"),), "in fog")),
        ("a black marked cross at night", Facts((Said("cross", mark="black"),), "at night")),
        ("far away photo of a cross at the top", Facts((Said("cross"),), "", "at the top")),
        ("a striped circle", Facts((Said("circle", pattern="striped"),))),
        (
            "white marked orange blue ringed cross",
            Facts((Said("cross", "orange", "blue", "ringed", "white"),)),
        ),
        (
            "painting of a <new1> circle beside a yellow square on sand in the style of art",
            Facts((Said("circle"), Said("square", "yellow", "", "plain")), "on sand"),
        ),
        (
            "red triangle to the left of a lime red split cross",
            Facts(
                (Said("triangle", "red", "", "plain"), Said("cross", "lime", "red", "split")),
                "",
                "to the left of",
            ),
        ),
        ("triangle above a circle", Facts((Said("triangle"), Said("circle")), "", "above")),
        ("a caterpillar", Facts(())),
        ("", Facts(())),
    ],
)
def test_captions_are_read(caption: str, facts: Facts) -> None:
    assert Facts.of(caption) == facts


def test_image_alignment_is_a_quarter_for_each_attribute() -> None:
    look = Look("cross", RED, "striped", GREEN, "white")
    far, near = (1.0, 1.0, 1.0), (RED[0], RED[1], RED[2] + COLOR_TOLERANCE)
    for changed, wanted in [
        (look, 1.0),
        (replace(look, mark="none"), 0.75),
        (replace(look, pattern="plain"), 0.5),  # nor has it a second colour
        (replace(look, pattern="split", mark="black"), 0.5),
        (replace(look, color=far), 0.75),
        (replace(look, color=far, second_color=far, mark="none"), 0.25),
        (replace(look, color=near), 0.75 + 0.25 / e),
        (replace(look, shape="circle"), 0.0),
    ]:
        seen = sight([changed, SQUARE])
        assert judge.image_alignment(seen, look).tolist() == pytest.approx([wanted], abs=2e-3)
        doubted = replace(seen, presence=0.3 * seen.presence)
        assert judge.image_alignment(doubted, look).item() == pytest.approx(0.3 * wanted, abs=2e-3)


def test_both_are_present_when_each_is_mostly_itself() -> None:
    pair = one, two = concept_look(0), concept_look(1)
    for looks, wanted in [
        ([one, two], True),
        ([one, replace(two, mark="none")], True),
        ([one, Look(two.shape, BLUE)], False),
        ([one], False),
    ]:
        assert judge.both_present(sight(looks), pair).tolist() == [wanted]


@pytest.mark.parametrize("seed", range(0, 10, 2))
def test_bleeding_is_wearing_a_colour_of_the_other(seed: int) -> None:
    looks = one, two = concept_look(seed), concept_look(seed + 1)
    assert judge.bleeds(sight([one, two]), looks).tolist() == [False]
    swapped = replace(one, color=one.second_color, second_color=one.color)
    assert judge.bleeds(sight([swapped, two]), looks).tolist() == [False]
    for worn in (two.color, two.second_color):
        assert judge.bleeds(sight([replace(one, color=worn), two]), looks).tolist() == [True]
        assert judge.bleeds(sight([replace(one, second_color=worn)]), looks).tolist() == [True]
    missing = sight([two])  # whatever is read where nothing is
    missing.color[:, SHAPES.index(one.shape)] = torch.tensor(two.color)
    assert judge.bleeds(missing, looks).tolist() == [False]


@pytest.mark.parametrize(
    "caption, seen, share, followed",
    [
        ("a circle", sight([CIRCLE]), 1, True),
        ("a circle", sight([]), 0, False),
        ("a circle", sight([SQUARE]), 1 / 2, False),  # one object at least
        ("a circle", sight([CIRCLE, SQUARE]), 1 / 2, False),
        ("a circle and a square", sight([CIRCLE, SQUARE]), 1, True),
        ("a circle and a square", sight([CIRCLE]), 1 / 3, False),
        ("red circle on snow", sight([CIRCLE]), 1, True),
        ("red circle on snow", sight([CIRCLE], background="at night"), 4 / 5, True),
        ("red circle", sight([replace(CIRCLE, color=BLUE)]), 3 / 4, False),
        ("red circle", sight([SPLIT]), 3 / 4, False),  # its red is there, but not alone
        ("red blue split circle", sight([SPLIT]), 1, True),
        ("red blue striped circle", sight([SPLIT]), 4 / 5, False),
        ("red green split circle", sight([SPLIT]), 4 / 5, False),
        ("split circle", sight([SPLIT]), 1, True),
        ("white marked circle", sight([CIRCLE]), 2 / 3, False),
        ("white marked circle", sight([replace(CIRCLE, mark="white")]), 1, True),
        ("circle on the left", sight([CIRCLE], LEFT), 1, True),
        ("circle on the left", sight([CIRCLE], RIGHT), 2 / 3, True),
        ("circle at the top", sight([CIRCLE], TOP), 1, True),
        ("circle to the left of a square", sight([CIRCLE, SQUARE], LEFT, RIGHT), 1, True),
        ("circle above a square", sight([CIRCLE, SQUARE], LEFT, RIGHT), 3 / 4, True),
        ("circle to the left of a square", sight([CIRCLE], LEFT), 1 / 4, False),
    ],
)
def test_text_alignment_is_the_share_that_is_seen(
    caption: str, seen: Seen, share: float, followed: bool
) -> None:
    facts = [Facts.of(caption)]
    assert judge.text_alignment(seen, facts).tolist() == pytest.approx([share], abs=2e-3)
    assert judge.follows(seen, facts).tolist() == [followed]


def test_each_picture_is_held_against_its_own_facts() -> None:
    one, two = sight([CIRCLE]), sight([SQUARE])
    both = Seen(*(torch.cat([getattr(x, name) for x in (one, two)]) for name in vars(one)))
    facts = [Facts.of("red circle"), Facts.of("blue square")]
    assert judge.follows(both, facts).tolist() == [True, True]
    assert judge.follows(both, facts[::-1]).tolist() == [False, False]
    assert judge.text_alignment(both, facts[::-1]).max() < 0.5
    assert judge.image_alignment(both, CIRCLE).tolist() == [1, 0]


def test_the_kernel_distance_is_the_unbiased_estimate() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 3, generator=generator) * 2 + n for n in (5, 7))
    xs, ys = (((f - y.mean(0)) / y.std(0)).tolist() for f in (x, y))

    def kernel(a: list[float], b: list[float]) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3

    within = [
        sum(kernel(f[i], f[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        for f, n in ((xs, 5), (ys, 7))
    ]
    between = sum(kernel(a, b) for a in xs for b in ys) / 35
    assert judge.kernel_distance(x, y) == pytest.approx(sum(within) - 2 * between, rel=1e-4)


def test_the_kernel_distance_is_near_nought_for_one_distribution_and_grows_with_a_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(400, 16, generator=generator) for _ in range(2))
    same, near, far = (judge.kernel_distance(x + shift, y) for shift in (0, 0.3, 0.6))
    assert abs(same) < 0.02 < 0.2 < near < far / 2


def test_the_autoencoder_keeps_the_mean_colours_of_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    colors = torch.rand(2, 3, 5, 7, generator=generator) * 1.6 - 0.8
    flat = colors.repeat_interleave(8, 2).repeat_interleave(8, 3)
    noise = torch.randn(flat.shape, generator=generator)
    autoencoder = BlockAutoencoder()
    latents = autoencoder.encode(flat + noise).latent_dist.mean
    means = torch.nn.functional.avg_pool2d(flat + noise, 8)
    torch.testing.assert_close(autoencoder.to_colors(latents), means)

    decoded = autoencoder.decode(autoencoder.encode(flat).latent_dist.mean).sample
    assert decoded.shape == flat.shape
    assert decoded.abs().max() <= 1
    # A block's centre lies between its four middle pixels.
    middles = [decoded[..., i::8, j::8] for i in (3, 4) for j in (3, 4)]
    torch.testing.assert_close(torch.stack(middles).mean(0), colors, rtol=0, atol=0.06)


def test_colours_become_latents_of_equal_weight_and_come_back_unchanged() -> None:
    generator = torch.Generator().manual_seed(0)
    colors = torch.randint(-128, 129, (1, 3, 300, 300), generator=generator) / 128
    autoencoder = BlockAutoencoder()
    latents = autoencoder.to_latents(colors)
    assert torch.equal(autoencoder.to_colors(latents), colors)
    variances = latents.var((0, 2, 3))
    torch.testing.assert_close(variances, variances.mean().expand(4), rtol=0.02, atol=0)


def test_one_odd_picture_spoils_the_kernel_distance_but_not_the_median_of_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(48, 16, generator=generator) for _ in range(2))
    odd = torch.cat([x[:1] + 30, x[1:]])
    assert judge.kernel_distance(odd, y) > 100 * abs(judge.kernel_distance(x, y))
    plain, spoilt = judge.block_kernel_distance(x, y), judge.block_kernel_distance(odd, y)
    spread = statistics.stdev(judge.kernel_distance(block, y) for block in x.split(judge.BLOCK))
    assert abs(spoilt - plain) < spread
    shifted = judge.block_kernel_distance(x + 1, y)
    assert shifted - plain > 5 * spread  # and a change of all pictures shows


def test_the_autoencoder_serves_the_trainer() -> None:
    image = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    autoencoder = BlockAutoencoder()
    mean, deviation = DiffusersLatentEncoder(autoencoder).moments(image)
    assert mean.shape == (4, 2, 3)
    assert torch.equal(mean, autoencoder.encode(image[None]).latent_dist.mean[0])
    assert torch.equal(deviation, torch.zeros(4, 2, 3))


def test_a_table_gives_mean_and_deviation_and_of_drift_median_and_largest() -> None:
    scores = [("ours", 0.5, 10), ("base", 0.25, 3), ("ours", 0.7, 20), ("ours", 0.6, 900)]
    rows = [(name, SimpleNamespace(share=share, drift=drift)) for name, share, drift in scores]
    assert markdown_table("method", rows, {"Share": ("share", 2), "Drift": ("drift", 0)}) == (
        "| method | Share | Drift |\n"
        "|---|---|---|\n"
        "| ours | 0.60 ± 0.10 | 20 (900) |\n"
        "| base | 0.25 ± 0.00 | 3 (3) |"
    )
