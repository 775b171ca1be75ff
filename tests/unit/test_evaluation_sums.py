"""KID, FID and alignment, against torchmetrics, clean-fid's published sums and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from custom_diffusion.concept.errors import DataError, IncompatibleModelError
from custom_diffusion.evaluation.alignment import (
    crop_scores,
    image_alignment,
    self_alignment,
    text_alignment,
)
from custom_diffusion.evaluation.distances import (
    Moments,
    frechet_distance,
    kernel_distance,
    subset_kernel_distance,
)
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance


def features(count: int, width: int = 24, seed: int = 0, shift: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(count, width, generator=generator) @ mixing + shift * seed


def as_pictures(found: Tensor) -> Tensor:
    """For torchmetrics, which asks a network for the features of pictures."""
    return found[:, :, None, None]


class Flat(torch.nn.Module):
    num_features = 24

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.flatten(1)


def clean_fid_kernel_distance(x: np.ndarray, y: np.ndarray, subsets: int, size: int) -> float:
    """clean-fid's `kernel_distance`, by its published sums."""
    n, total = x.shape[1], 0.0
    m = min(min(x.shape[0], y.shape[0]), size)
    rng = np.random.default_rng(0)
    for _ in range(subsets):
        a, b = (f[rng.choice(len(f), m, replace=False)] for f in (x, y))
        within = (a @ a.T / n + 1) ** 3 + (b @ b.T / n + 1) ** 3
        between = (a @ b.T / n + 1) ** 3
        total += (within.sum() - np.diag(within).sum()) / (m - 1) - between.sum() * 2 / m
    return total / subsets / m


def test_kid_is_that_of_clean_fid() -> None:
    x, y = features(90), features(90, seed=1)
    ours = kernel_distance(x, y)
    theirs = clean_fid_kernel_distance(x.double().numpy(), y.double().numpy(), 1, 90)
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_kid_is_that_of_torchmetrics() -> None:
    x, y = features(40), features(40, seed=1)
    theirs = KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=40).double()
    theirs.update(as_pictures(y.double()), real=True)
    theirs.update(as_pictures(x.double()), real=False)
    mean, _ = theirs.compute()
    assert kernel_distance(x, y) == pytest.approx(float(mean), rel=1e-6)


def test_kid_of_all_pictures_is_the_sum_over_pairs() -> None:
    """Sets of two sizes, larger than the rows that are in memory at once."""
    x, y = features(1100, 3).double(), features(7, 3, seed=1).double()

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 3 + 1) ** 3

    within_x = (
        (((x @ x.T / 3 + 1) ** 3).sum() - ((x * x).sum(1) / 3 + 1).pow(3).sum()) / 1100 / 1099
    )
    within_y = sum(kernel(y[i], y[j]) for i in range(7) for j in range(7) if i != j) / 42
    between = sum(kernel(a, b) for a in x for b in y) / 7700
    assert kernel_distance(x, y) == pytest.approx(
        float(within_x) + within_y - 2 * between, rel=1e-9
    )


def test_kid_is_unbiased() -> None:
    """Of two samples of one distribution it is as often below 0 as above."""
    found = [
        kernel_distance(torch.randn(8, 4, generator=g), torch.randn(8, 4, generator=g))
        for g in [torch.Generator().manual_seed(3)]
        for _ in range(400)
    ]
    values = torch.tensor(found)
    assert abs(float(values.mean())) < 3 * float(values.std()) / math.sqrt(len(values))
    assert 0.3 < float((values < 0).float().mean()) < 0.7


def test_kid_of_subsets_is_near_that_of_all_and_repeats_itself() -> None:
    x, y = features(200), features(150, seed=1)
    mean, deviation = subset_kernel_distance(x, y, subsets=60, size=50)
    assert mean == pytest.approx(kernel_distance(x, y), abs=4 * deviation / math.sqrt(60))
    assert deviation > 0
    assert subset_kernel_distance(x, y, subsets=60, size=50) == (mean, deviation)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    subset_kernel_distance(x, y, subsets=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("counts", [(300, 200), (10, 200), (5, 4)])
def test_fid_is_that_of_torchmetrics_and_of_scipys_root(counts: tuple[int, int]) -> None:
    """Also of fewer pictures than numbers, where covariances are singular."""
    x, y = features(counts[0]), features(counts[1], seed=1)
    ours = frechet_distance(Moments.of([x]), Moments.of([y]))
    theirs = FrechetInceptionDistance(feature=Flat(), input_img_size=(24, 1, 1)).set_dtype(
        torch.float64
    )
    theirs.update(as_pictures(y.double()), real=True)
    theirs.update(as_pictures(x.double()), real=False)
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-4)
    one, other = (np.cov(f.double().numpy(), rowvar=False) for f in (x, y))
    gap = x.double().mean(0).numpy() - y.double().mean(0).numpy()
    root = scipy.linalg.sqrtm(one @ other).real
    wanted = gap @ gap + np.trace(one + other - 2 * root)
    assert ours == pytest.approx(float(wanted), rel=1e-4)


def test_moments_of_batches_are_those_of_all() -> None:
    x = features(101) + 1000  # far from nought, where a sum of squares would lose its digits
    whole, parts = Moments.of([x]), Moments.of([x[:1], x[1:50], x[50:50], x[50:]])
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(parts.covariance, np.cov(x.double().numpy(), rowvar=False), 1e-8)


@pytest.mark.parametrize("count", [0, 1])
def test_one_picture_is_too_few_and_it_is_said(count: int) -> None:
    with pytest.raises(DataError, match=f"{count} pictures have no spread"):
        kernel_distance(features(count), features(9))
    with pytest.raises(DataError, match=f"{count} pictures have no spread"):
        Moments.of([features(count)])


def test_features_of_two_models_are_refused() -> None:
    with pytest.raises(IncompatibleModelError, match="24 and of 8 numbers"):
        kernel_distance(features(5), features(5, 8))
    with pytest.raises(IncompatibleModelError, match="24 and of 8 numbers"):
        frechet_distance(Moments.of([features(5)]), Moments.of([features(5, 8)]))


def unit(found: Tensor) -> Tensor:
    return found / found.norm(dim=-1, keepdim=True)


def test_alignments_are_means_of_cosines() -> None:
    drawn, references, texts = (
        unit(features(6)),
        unit(features(4, seed=1)),
        unit(features(6, seed=2)),
    )
    cosine = torch.nn.functional.cosine_similarity
    pairs = torch.stack([cosine(one[None], references) for one in drawn])
    torch.testing.assert_close(image_alignment(drawn, references), pairs.mean(1))
    own = [
        [float(a @ b) for j, b in enumerate(references) if j != i] for i, a in enumerate(references)
    ]
    assert self_alignment(references).tolist() == pytest.approx([sum(row) / 3 for row in own])
    assert self_alignment(references[:1]).isnan().all()
    scores = text_alignment(drawn, texts)
    assert scores.tolist() == pytest.approx(
        [2.5 * max(0.0, float(a @ b)) for a, b in zip(drawn, texts, strict=True)], abs=1e-6
    )
    assert float(text_alignment(drawn, -drawn).max()) == 0


def test_crops_tell_presence_resemblance_and_bleed() -> None:
    cat, dog = torch.eye(8)[0], torch.eye(8)[1]
    references = [cat.expand(3, 8), dog.expand(2, 8)]
    half = unit((cat + dog)[None])[0]
    clean = crop_scores([cat.expand(4, 8), dog.expand(4, 8)], references)
    assert clean.presence.tolist() == clean.resemblance.tolist() == [1, 1]
    assert clean.bleed.tolist() == [[0, 0], [0, 0]]
    mixed = crop_scores([torch.stack([cat, half, dog, dog]), dog.expand(4, 8)], references)
    assert mixed.presence.tolist() == pytest.approx([0.5, 1])
    assert mixed.resemblance.tolist() == pytest.approx([(1 + 2**-0.5) / 4, 1])
    assert mixed.bleed[0, 1].item() == pytest.approx((2 + 2**-0.5) / 4)
    assert mixed.bleed[1, 0].item() == 0
