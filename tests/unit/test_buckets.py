"""Aspect buckets: which sizes there are, what a picture loses in one, and what a step sees."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from custom_diffusion.concept.errors import ConfigError
from custom_diffusion.host.diffusers.lending import DiffusersModels
from custom_diffusion.pictures.opening import read_picture, read_size
from custom_diffusion.pictures.tensors import of_network, to_picture
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.data.augmentation import random_view, whole_view
from custom_diffusion.trainer.data.batches import Batches, Turns, step_randomness
from custom_diffusion.trainer.data.buckets import bucket_for, buckets, shared_out
from custom_diffusion.trainer.data.captioned import CaptionedImage, Picture
from custom_diffusion.trainer.data.contact_sheet import contact_sheet
from custom_diffusion.trainer.data.latents import LatentBank, encode_views, kept_back
from custom_diffusion.trainer.data.training_concept import TrainingConcept
from custom_diffusion.trainer.events import Bucketed, CheckpointDue, Event, PreviewDrawn
from custom_diffusion.trainer.loop import train
from PIL import Image, ImageDraw
from support.tiny_models import AveragingEncoder

SQUARE, UPRIGHT, WIDE = (320, 320), (200, 360), (420, 280)


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def concept(*sizes: tuple[int, int], noun: str = "cat", guards: int = 0) -> TrainingConcept:
    return TrainingConcept(
        tuple(
            CaptionedImage(noise(size, seed), f"{noun} {seed}") for seed, size in enumerate(sizes)
        ),
        noun,
        regularization=tuple(
            CaptionedImage(noise(SQUARE, 50 + n), f"guard {n}") for n in range(guards)
        ),
    )


def config(**changes: Any) -> TrainConfig:
    settings = {"resolution": 256, "batch_size": 4, "views_per_image": 3, "augment": False}
    return TrainConfig(**{**settings, "flip": False, "preview_every_steps": 0, **changes})


def bank(taught: TrainingConcept, settings: TrainConfig) -> LatentBank:
    return encode_views(taught, AveragingEncoder(), settings)


class TestSizes:
    @pytest.mark.parametrize("resolution", [256, 384, 512, 640, 768, 1024, 1280])
    def test_sides_are_on_the_grid_and_the_area_is_about_that_of_the_square(
        self, resolution: int
    ) -> None:
        sizes = buckets(resolution)
        assert {(h, w) for w, h in sizes} == set(sizes)
        assert (resolution, resolution) in sizes
        for width, height in sizes:
            assert width % 64 == height % 64 == 0 and max(width, height) <= 4 * min(width, height)
            assert width * height <= resolution**2
            assert min(width, height) < 320 or width * height > 0.75 * resolution**2

    def test_sdxls_are_the_published_ones(self) -> None:
        """Appendix I of the SDXL paper: forty and the square; a few of them."""
        assert len(buckets(1024)) == 41
        assert {(512, 2048), (704, 1344), (832, 1152), (1216, 832), (1920, 512)} < {*buckets(1024)}

    @pytest.mark.parametrize(("resolution", "kept"), [(512, 0.89), (768, 0.93), (1024, 0.94)])
    def test_a_usual_photograph_loses_little(self, resolution: int, kept: float) -> None:
        for width, height in [(3, 2), (2, 3), (4, 3), (3, 4), (5, 4), (1, 1), (16, 9), (9, 16)]:
            across, down = bucket_for(1000 * width, 1000 * height, resolution)
            ratio = (width / height) / (across / down)
            assert min(ratio, 1 / ratio) > kept

    def test_what_is_longer_than_any_takes_the_longest(self) -> None:
        assert bucket_for(8000, 300, 512) == (1024, 256)
        assert bucket_for(3, 900, 1024) == (512, 2048)

    @pytest.mark.parametrize("turn", range(1, 9))
    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
    def test_a_file_tells_its_size_as_it_is_opened(
        self, turn: int, suffix: str, tmp_path: Path
    ) -> None:
        exif = Image.Exif()
        exif[0x0112] = turn
        path = tmp_path / f"a.{suffix}"
        noise((30, 20)).save(path, exif=exif)
        assert read_size(path) == read_picture(path).size


class TestViews:
    @pytest.mark.parametrize("size", [UPRIGHT, WIDE, SQUARE, (300, 1200), (900, 100)])
    def test_nothing_is_squashed(self, size: tuple[int, int]) -> None:
        """A disc in the middle is a disc in the view."""
        picture = Image.new("RGB", size, "black")
        radius = min(size) // 3
        middle = size[0] / 2, size[1] / 2
        ImageDraw.Draw(picture).ellipse(
            [c - radius for c in middle] + [c + radius for c in middle], "white"
        )
        frame = bucket_for(*size, 256)
        shown = to_picture(of_network(whole_view(Picture(picture), frame).image_chw)).convert("L")
        assert shown.size == frame
        left, top, right, bottom = shown.point(lambda shade: 255 * (shade > 127)).getbbox() or ()
        assert abs((right - left) - (bottom - top)) <= 3
        assert abs(left + right - frame[0]) <= 3 and abs(top + bottom - frame[1]) <= 3

    def test_only_what_does_not_fit_the_grid_is_lost(self) -> None:
        """By Pillow's own arithmetic: the middle of the picture, scaled."""
        picture = noise(UPRIGHT)
        frame = bucket_for(*UPRIGHT, 256)
        assert frame == (192, 320)
        wanted = picture.crop((0, 13, 200, 346)).resize(frame, Image.Resampling.BICUBIC)
        view = whole_view(Picture(picture), frame)
        assert np.array_equal(to_picture(of_network(view.image_chw)), wanted)
        assert view.sizes == (360, 200, 13 * 320 // 333, 0, 320, 192)
        assert view.mask.shape == (40, 24) and view.mask.all()

    def test_random_sizes_stay_in_the_frame_and_in_shape(self) -> None:
        rng, frame = random.Random(0), (192, 320)
        white = Picture(Image.new("RGB", UPRIGHT, "white"))
        words = Counter()
        for _ in range(200):
            view = random_view(white, frame, rng)
            words[view.prefix] += 1
            assert view.image_chw.shape == (3, 320, 192) and view.mask.shape == (40, 24)
            seen = (view.image_chw[0] > 0.9).nonzero()
            height, width = (seen.max(0).values - seen.min(0).values + 1).tolist()
            if view.prefix in ("very small", "far away"):
                assert width < 0.61 * 192 and abs(height / width - 320 / 192) < 0.06
                assert 0 < view.mask.sum() < 0.4 * 40 * 24
            else:
                assert view.mask.sum() > 0.3 * 40 * 24
        assert len(words) == 5 and 0.2 < (words["very small"] + words["far away"]) / 200 < 0.35

    def test_the_sheet_shows_each_in_its_shape(self) -> None:
        sheet = np.asarray(contact_sheet(concept(UPRIGHT, WIDE), config()))
        upright, wide = (sheet[6 + 212 * row : 166 + 212 * row, 330:490] for row in range(2))
        white = [(tile == 255).all((0, 2)) for tile in (upright, wide)]
        assert white[0].sum() == 64 and not white[1].any()


class TestSteps:
    @pytest.mark.parametrize("guards", [0, 5])
    def test_a_step_sees_one_size_and_all_pictures_come_equally_often(self, guards: int) -> None:
        settings = config()
        taught = concept(SQUARE, SQUARE, SQUARE, UPRIGHT, WIDE, WIDE, guards=guards)
        batches = Batches([bank(taught, settings)], settings)
        assert batches.pictures == {(192, 320): 1, (256, 256): 3, (320, 192): 2}
        assert batches.fewer == [f for f, n in batches.pictures.items() if n < 4 - 2 * bool(guards)]
        drawn, frames = Counter[str](), Counter[tuple[int, ...]]()
        for step in range(60):
            batch = batches.of_step(step, *step_randomness(0, step))
            assert len(batch.prompts) == 4 and batch.prior == 2 * bool(guards)
            assert batch.latents_bchw.shape[2:] == batch.masks_bhw.shape[1:]
            assert [*batch.sizes[0, 4:] // 8] == [*batch.masks_bhw.shape[1:]]
            frames[tuple(batch.sizes[0, 4:].tolist())] += 1
            drawn.update(batch.prompts)
            counts = [drawn[f"cat {n}"] for n in range(6)]
            assert max(counts) - min(counts) <= 2 * 4
        assert frames == {(256, 256): 30, (320, 192): 10, (192, 320): 20}
        assert len({drawn[f"cat {n}"] for n in range(6)}) == 1
        if guards:
            assert all(drawn[f"guard {n}"] >= 10 for n in range(5))

    def test_concepts_come_equally_often_whatever_their_shapes(self) -> None:
        """One has all its pictures upright, the other four shapes; one alone has guards."""
        settings = config()
        banks = [
            bank(concept(UPRIGHT, UPRIGHT, guards=3), settings),
            bank(concept(SQUARE, UPRIGHT, WIDE, (100, 400), WIDE, noun="dog"), settings),
        ]
        batches = Batches(banks, settings)
        drawn = Counter[str]()
        for step in range(200):
            drawn.update(batches.of_step(step, *step_randomness(0, step)).prompts)
        cats, dogs = ([drawn[f"{noun} {n}"] for n in range(5)] for noun in ("cat", "dog"))
        assert abs(sum(cats) - sum(dogs)) < 0.03 * sum(cats)
        assert max(dogs) - min(dogs) <= 8 and max(cats[:2]) - min(cats[:2]) <= 8

    def test_a_step_needs_no_step_before_it(self) -> None:
        settings = config()
        known = bank(concept(SQUARE, UPRIGHT, WIDE, guards=2), settings)
        batches = Batches([known], settings)
        before = [batches.of_step(step, *step_randomness(0, step)) for step in range(20)]
        for step in (13, 2, 19):
            again = Batches([known], settings).of_step(step, *step_randomness(0, step))
            assert again.prompts == before[step].prompts
            assert torch.equal(again.latents_bchw, before[step].latents_bchw)

    def test_turns_are_never_far_from_their_shares(self) -> None:
        shares = [5.0, 1.0, 0.25, 2.5]
        turns, seen = Turns(shares), Counter[int]()
        for turn in range(700):
            which, before = turns[turn]
            assert before == seen[which]
            seen[which] += 1
            for one, share in enumerate(shares):
                assert abs(seen[one] - (turn + 1) * share / sum(shares)) < 1.5

    def test_pictures_of_the_class_are_cut_to_the_shapes_that_need_them(self) -> None:
        sizes = [SQUARE] * 6 + [UPRIGHT, WIDE]
        shared = shared_out(sizes, {(256, 256): 2, (192, 320): 1, (320, 192): 1})
        assert Counter(frame for _, frame in shared) == {
            (256, 256): 4,
            (192, 320): 2,
            (320, 192): 2,
        }
        assert (6, (192, 320)) in shared and (7, (320, 192)) in shared
        assert sorted(place for place, _ in shared) == list(range(8))
        one = shared_out([SQUARE], {(256, 256): 9, (192, 320): 1})
        assert {frame for _, frame in one} == {(256, 256), (192, 320)}

    def test_no_picture_of_the_class_is_cut_to_a_shape_that_no_step_draws(self) -> None:
        """One shape is kept back for validation, another weighs nothing."""
        taught = concept(SQUARE, SQUARE, WIDE, UPRIGHT, guards=4)
        upright = replace(taught.images[3], weight=0)
        taught = replace(taught, images=(*taught.images[:3], upright))
        settings = next(
            found
            for seed in range(100)
            if kept_back(found := config(seed=seed, validation_pictures=1), 4) == [2]
        )
        known = bank(taught, settings)
        assert {views[0].frame for views in known.kept_back} == {(320, 192)}
        assert [view.frame for view in known.regularization] == [(256, 256)] * 4
        batches, drawn = Batches([known], settings), Counter[str]()
        for step in range(8):
            drawn.update(batches.of_step(step, *step_randomness(0, step)).prompts)
        assert {name for name in drawn if "guard" in name} == {f"guard {n}" for n in range(4)}
        contact_sheet(taught, settings)

    def test_several_resolutions_are_all_seen_equally_often(self) -> None:
        settings = config(more_resolutions="192, 384", views_per_image=2)
        known = bank(concept(SQUARE, WIDE, guards=4), settings)
        frames = Counter(views[0].frame for views in known.instances)
        assert len(frames) == 6 and len(known.instances) == 6
        batches = Batches([known], settings)
        drawn = Counter[tuple[int, ...]]()
        for step in range(60):
            batch = batches.of_step(step, *step_randomness(0, step))
            drawn[tuple(batch.sizes[0, 4:].tolist())] += 1
        assert {*drawn.values()} == {10}

    @pytest.mark.parametrize("wrong", ["384,x", "0", "100000", "385", "-64", "3.5"])
    def test_what_is_no_resolution_is_refused(self, wrong: str) -> None:
        with pytest.raises(ConfigError, match="resolution"):
            config(more_resolutions=wrong)


class TestTraining:
    def run(
        self, models: DiffusersModels, settings: TrainConfig, events: list[Event], **options: Any
    ) -> Any:
        taught = [
            replace(one, token=f"<new{n}>", images=tuple(replaced(one, f"<new{n}>")))
            for n, one in enumerate((concept(SQUARE, UPRIGHT, WIDE), concept(WIDE, noun="dog")))
        ]
        banks = [bank(one, settings) for one in taught]
        return train(
            settings,
            taught,
            banks,
            models.denoiser,
            models.text_encoder,
            on_event=events.append,
            **options,
        )

    @pytest.mark.slow
    def test_a_run_over_several_shapes_says_so_previews_squares_and_goes_on(
        self, models: DiffusersModels
    ) -> None:
        settings = config(
            resolution=128,
            batch_size=2,
            steps=6,
            preview_every_steps=3,
            preview_prompts=f"a <new1> cat, {'red ' * 80}",  # two chunks beside an empty prompt
        )
        events: list[Event] = []
        whole = self.run(models, settings, events, checkpoint_every_steps=3)
        (told,) = (event for event in events if isinstance(event, Bucketed))
        assert "128 x 128" in told.text() and events[0] is told
        previews = [event.image_hwc for event in events if isinstance(event, PreviewDrawn)]
        assert [tuple(image.shape) for image in previews] == [(128, 128, 3)] * 2

        half: list[Event] = []
        self.run(
            models,
            settings,
            half,
            checkpoint_every_steps=3,
            should_stop=lambda: any(isinstance(event, CheckpointDue) for event in half),
        )
        checkpoint = next(event.checkpoint for event in half if isinstance(event, CheckpointDue))
        rest = self.run(models, settings, [], checkpoint=checkpoint)
        assert rest.provenance["final_losses"] == whole.provenance["final_losses"]
        for layer in whole.layers:
            assert torch.equal(rest.deltas[layer].dense(), whole.deltas[layer].dense())


def replaced(taught: TrainingConcept, token: str) -> list[CaptionedImage]:
    return [replace(one, caption=f"a {token} {taught.class_noun}") for one in taught.images]
