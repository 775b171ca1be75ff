"""What pictures and concepts count: how it is written, and what it does to a step's loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from custom_diffusion.concept.errors import DataError
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.data.advice import advice
from custom_diffusion.trainer.data.batches import Batches, step_randomness
from custom_diffusion.trainer.data.captioned import CaptionedImage
from custom_diffusion.trainer.data.latents import LatentBank, encode_views
from custom_diffusion.trainer.data.weights import with_weights
from PIL import Image
from support.tiny_models import RESOLUTION, cat_concept, dog_concept, random_bank
from torch import Tensor

FILES = tuple(CaptionedImage(Path(f"cat{n}.jpg"), "a <new1> cat") for n in (1, 2, 3))
CONFIG = TrainConfig(batch_size=4, resolution=RESOLUTION, augment=False, flip=False)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("", [1, 1, 1]),
        ("1 2, 0.5", [1, 2, 0.5]),
        ("1\n0\n3", [1, 0, 3]),
        ("cat3.jpg: 2", [1, 1, 2]),
        ("cat1.jpg: 0, cat2.jpg: 4\n", [0, 4, 1]),
    ],
)
def test_weights_are_read_as_they_are_written(text: str, weights: list[float]) -> None:
    assert [image.weight for image in with_weights(FILES, text)] == weights


def test_pictures_without_a_file_are_named_by_their_number() -> None:
    images = [CaptionedImage(Image.new("RGB", (8, 8)), "a cat") for _ in range(2)]
    assert [image.weight for image in with_weights(images, "2: 5")] == [1, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2", "2 picture weights were given for 3 pictures"),
        ("dog.jpg: 1", r"'dog.jpg', and no picture is called so.*cat1.jpg, cat2.jpg"),
        ("1 -2 1", "'-2' in the picture weights .* is no number of 0 or more"),
        ("cat1.jpg: much", "'much' in the picture weights"),
        ("1 nan 1", "'nan' in"),
    ],
)
def test_what_is_no_weight_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        with_weights(FILES, text)


def test_weights_that_are_all_zero_are_refused() -> None:
    nothing = tuple(replace(image, weight=0.0) for image in cat_concept().images)
    with pytest.raises(DataError, match="all 2 pictures of the cat are 0"):
        replace(cat_concept(), images=nothing)
    for weight in (0.0, -1.0, float("inf")):
        with pytest.raises(DataError, match="weight of the concept '<new1> cat' is"):
            replace(cat_concept(), weight=weight)
    some = (cat_concept().images[0], *nothing[1:])
    concept = replace(cat_concept(), images=some)
    refused = 0
    for seed in range(6):  # the one that counts is kept back, or the other
        settings = replace(CONFIG, validation_pictures=1, seed=seed)
        try:
            encode_views(concept, FlatEncoder(), settings)
        except DataError as error:
            assert "that are not kept back are 0" in str(error)
            refused += 1
    assert 0 < refused < 6


class FlatEncoder:
    def moments(self, image_chw: Tensor) -> tuple[Tensor, Tensor]:
        edge = image_chw.shape[-1] // 8
        return torch.full((4, edge, edge), 7.0), torch.zeros(4, edge, edge)


def test_a_picture_of_no_weight_is_left_out_and_said() -> None:
    images = cat_concept(3).images
    concept = replace(cat_concept(3), images=(replace(images[0], weight=0.0), *images[1:]))
    assert len(encode_views(concept, FlatEncoder(), CONFIG).instances) == 2
    assert any("weight 0, so not learnt from: picture 1" in one for one in advice(concept))


def weighted(bank: LatentBank, weights: list[float]) -> LatentBank:
    pairs = zip(bank.instances, weights, strict=True)
    views = tuple(tuple(replace(view, weight=w) for view in views) for views, w in pairs)
    return replace(bank, instances=views)


def test_the_mean_of_what_samples_count_is_one_and_their_ratios_are_the_weights() -> None:
    """Over whole passes every picture comes up equally often."""
    cat = weighted(random_bank(cat_concept(2)), [1.0, 3.0])
    dog = weighted(random_bank(dog_concept(2)), [8.0, 8.0])
    batches = Batches([cat, dog], CONFIG)
    counts: list[float] = []
    for step in range(8):
        balance = batches.of_step(step, *step_randomness(0, step)).balance
        assert balance is not None
        counts += balance.tolist()
    assert sum(counts) / len(counts) == pytest.approx(1)
    assert sorted(set(counts)) == pytest.approx([0.2, 0.6, 1.6])  # of 1, 3, 8, 8: mean 5
    alike = Batches([weighted(cat, [2.0, 2.0])], CONFIG)
    assert alike.of_step(0, *step_randomness(0, 0)).balance is None
