"""The checks before a run, the latent bank, and the batches drawn from it."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.errors import ConfigError, DataError, TokenError
from custom_diffusion.diffusion.protocols import whole_picture
from custom_diffusion.host.diffusers.lending import DiffusersModels
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.data.augmentation import LARGE_PREFIXES, PREFIXES, SMALL_PREFIXES
from custom_diffusion.trainer.data.batches import Batch, Batches, step_randomness
from custom_diffusion.trainer.data.captioned import CaptionedImage
from custom_diffusion.trainer.data.latents import (
    EncodedView,
    LatentBank,
    encode_views,
    instance_views,
    regularization_view,
)
from custom_diffusion.trainer.data.training_concept import TrainingConcept
from custom_diffusion.trainer.prepare import prepare
from PIL import Image
from support.children import run_python
from support.tiny_models import AveragingEncoder
from torch import Tensor

CAPTION = "photo of a <new1> cat"


def picture(number: int = 0) -> Image.Image:
    """Red on the left, blue on the right; a little different for each number."""
    image = Image.new("RGB", (64, 64), (0, number, 255))
    image.paste("red", (0, 0, 32, 64))
    return image


def concept(images: int = 1, regularization: int = 0) -> TrainingConcept:
    return TrainingConcept(
        images=tuple(CaptionedImage(picture(), CAPTION) for _ in range(images)),
        class_noun="cat",
        token="<new1>",
        regularization=tuple(CaptionedImage(picture(), f"cat {n}") for n in range(regularization)),
    )


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "resolution": 64,
            "batch_size": 4,
            "views_per_image": 8,
            "gradient_cut": "start",
            **changes,
        }
    )


def bank_of(
    images: int, regularization: int = 0, deviation: float = 0.0, name: str = ""
) -> LatentBank:
    """One view an image; the mean of instance n is n, of regularization image n it is -1 - n."""

    def view(value: float, prompt: str) -> EncodedView:
        shape = (4, 8, 8)
        mean, spread = torch.full(shape, value), torch.full(shape, deviation)
        return EncodedView(mean, spread, torch.full((8, 8), value), prompt, whole_picture(64))

    return LatentBank(
        tuple((view(float(n), f"{name}instance {n}"),) for n in range(images)),
        tuple(view(-1.0 - n, f"{name}regularization {n}") for n in range(regularization)),
    )


def draw(bank: LatentBank, settings: TrainConfig, count: int, seed: int = 0) -> list[Batch]:
    return draw_together([bank], settings, count, seed)


def draw_together(
    banks: Sequence[LatentBank], settings: TrainConfig, count: int, seed: int = 0
) -> list[Batch]:
    batches = Batches(banks, replace(settings, seed=seed))
    return [batches.of_step(step, *step_randomness(seed, step)) for step in range(count)]


def red_is_left(view: EncodedView) -> bool:
    redness = (view.mean[0] - view.mean[2]).sum(0)  # of each column; grey has none
    return bool(redness[redness.abs() > 0.01][0] > 0)


def test_the_bank_depends_on_the_seed_alone() -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    one, same, other = (
        encode_views(concept(2, 1), AveragingEncoder(), config(seed=seed)) for seed in (3, 3, 4)
    )
    for views, same_views in zip(one.instances, same.instances, strict=True):
        for view, same_view in zip(views, same_views, strict=True):
            assert torch.equal(view.mean, same_view.mean)
            assert torch.equal(view.mask, same_view.mask)
            assert view.prompt == same_view.prompt
    assert any(
        not torch.equal(view.mean, other_view.mean)
        for view, other_view in zip(one.instances[0], other.instances[0], strict=True)
    )
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


@pytest.mark.parametrize(
    "augment, flip, views", [(True, True, 8), (True, False, 8), (False, True, 2), (False, False, 1)]
)
def test_every_instance_image_has_its_views_and_progress_is_told(
    augment: bool, flip: bool, views: int
) -> None:
    encoder, progress = AveragingEncoder(), []
    bank = encode_views(
        concept(2, 3),
        encoder,
        config(augment=augment, flip=flip),
        lambda done, total: progress.append((done, total)),
    )
    assert [len(image) for image in bank.instances] == [views, views]
    assert len(bank.regularization) == 3
    total = 2 * views + 3
    assert progress == [(n, total) for n in range(1, total + 1)]


@pytest.mark.parametrize("augment", [True, False])
def test_views_that_are_equal_to_the_bit_are_encoded_once(augment: bool) -> None:
    """Of one picture, of two that are the same, and of those beside the concept; what stands in
    the bank is what each view would have given alone.
    """
    settings = config(augment=augment)
    taught = concept(3, 2)
    twin = replace(taught.images[0], caption=f"{CAPTION} again")
    taught = replace(
        taught, images=(*taught.images, twin, CaptionedImage(picture(9), CAPTION, repeats=7))
    )
    encoder = AveragingEncoder()
    bank = encode_views(taught, encoder, settings)
    views = [view for _, view in instance_views(taught.images, len(bank.instances[0]), settings)]
    views += [regularization_view(image, (64, 64), settings) for image in taught.regularization]
    assert encoder.calls == len({view.image_chw.numpy().tobytes() for view in views}) < len(views)
    found = [view for one in bank.instances[:5] for view in one] + [*bank.regularization]
    assert len(found) == len(views)
    for view, wanted in zip(found, views, strict=True):
        assert view.mean.equal(AveragingEncoder().moments(wanted.image_chw)[0])
        assert view.mask.equal(wanted.mask)
    assert bank.instances[3][0].prompt.endswith("again")
    held = {view.mean.data_ptr() for view in found}
    assert len(held) == encoder.calls


@pytest.mark.parametrize("augment", [True, False])
def test_exactly_half_of_the_views_are_mirrored(augment: bool) -> None:
    (views,) = encode_views(concept(), AveragingEncoder(), config(augment=augment)).instances
    assert sum(red_is_left(view) for view in views) == len(views) // 2


def test_no_view_is_mirrored_when_flipping_is_off() -> None:
    (views,) = encode_views(concept(), AveragingEncoder(), config(flip=False)).instances
    assert all(red_is_left(view) for view in views)


def test_prompts_say_how_the_picture_was_resized() -> None:
    (views,) = encode_views(concept(), AveragingEncoder(), config(views_per_image=60)).instances
    small = {f"{prefix} {CAPTION}" for prefix in SMALL_PREFIXES}
    large = {f"{prefix} {CAPTION}" for prefix in LARGE_PREFIXES}
    assert {view.prompt for view in views} == {CAPTION, *small, *large}
    for view in views:
        assert (view.prompt in small) == bool((view.mask == 0).any())


def test_without_augmentation_views_are_whole_and_prompts_plain() -> None:
    (views,) = encode_views(concept(), AveragingEncoder(), config(augment=False)).instances
    for view in views:
        assert view.prompt == CAPTION
        assert view.mask.equal(torch.ones(8, 8))


def test_regularization_images_are_whole_unmirrored_and_keep_their_captions() -> None:
    bank = encode_views(concept(1, 6), AveragingEncoder(), config())
    assert [view.prompt for view in bank.regularization] == [f"cat {n}" for n in range(6)]
    for view in bank.regularization:
        assert red_is_left(view)
        assert view.mask.equal(torch.ones(8, 8))


def test_every_image_comes_up_equally_often() -> None:
    prompts = Counter(p for batch in draw(bank_of(5, 3), config(), 30) for p in batch.prompts)
    assert [prompts[f"instance {n}"] for n in range(5)] == [12] * 5
    assert [prompts[f"regularization {n}"] for n in range(3)] == [20] * 3


def test_no_image_comes_again_before_all_had_their_turn_and_the_order_changes() -> None:
    drawn = [p for batch in draw(bank_of(4), config(), 10) for p in batch.prompts]
    rounds = [tuple(drawn[n : n + 4]) for n in range(0, 40, 4)]
    assert all(len(set(order)) == 4 for order in rounds)
    assert len(set(rounds)) > 1


@pytest.mark.parametrize("size, prior", [(8, 4), (5, 2), (2, 1)])
def test_the_second_half_of_a_batch_is_regularization(size: int, prior: int) -> None:
    for batch in draw(bank_of(3, 3), config(batch_size=size), 5):
        assert batch.prior == prior
        assert len(batch.prompts) == len(batch.latents_bchw) == len(batch.masks_bhw) == size
        kinds = [prompt.split()[0] for prompt in batch.prompts]
        assert kinds == ["instance"] * (size - prior) + ["regularization"] * prior


def test_without_regularization_images_the_batch_is_all_instances() -> None:
    (batch,) = draw(bank_of(2), config(batch_size=6), 1)
    assert batch.prior == 0
    assert Counter(batch.prompts) == {"instance 0": 3, "instance 1": 3}


def test_latents_masks_and_prompts_of_a_sample_belong_together() -> None:
    for batch in draw(bank_of(5, 5), config(batch_size=6), 10):
        for latents, mask, prompt in zip(
            batch.latents_bchw, batch.masks_bhw, batch.prompts, strict=True
        ):
            kind, number = prompt.split()
            value = float(number) if kind == "instance" else -1.0 - float(number)
            assert (latents == value).all()
            assert (mask == value).all()


def test_latents_are_drawn_afresh_with_the_mean_and_deviation_of_their_view() -> None:
    drawn = torch.stack([b.latents_bchw for b in draw(bank_of(1, 0, 0.5), config(), 100)])
    assert drawn.mean().item() == pytest.approx(0.0, abs=0.01)
    assert drawn.std().item() == pytest.approx(0.5, rel=0.02)
    samples = drawn.flatten(0, 1).flatten(1)
    assert len(torch.unique(samples, dim=0)) == len(samples)


def test_all_views_of_an_image_are_drawn() -> None:
    views = encode_views(concept(), AveragingEncoder(), config(views_per_image=6))
    numbered = tuple(
        replace(view, prompt=str(number)) for number, view in enumerate(views.instances[0])
    )
    drawn = Counter(p for b in draw(LatentBank((numbered,), ()), config(), 150) for p in b.prompts)
    assert set(drawn) == {str(n) for n in range(6)}
    assert min(drawn.values()) > 60


def test_batches_depend_on_seed_and_step_alone() -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    bank = bank_of(4, 2, 1.0)
    one, same, other = (draw(bank, config(), 5, seed=seed) for seed in (1, 1, 2))
    for batch, same_batch in zip(one, same, strict=True):
        assert torch.equal(batch.latents_bchw, same_batch.latents_bchw)
        assert batch.prompts == same_batch.prompts
    assert any(b.prompts != o.prompts for b, o in zip(one, other, strict=True))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


def test_a_step_needs_no_step_before_it() -> None:
    banks, settings = [bank_of(4, 3, 1.0), bank_of(2, 0, 1.0)], config(seed=3)
    in_order = draw_together(banks, settings, 12, seed=3)
    for step in (11, 4, 7):
        again = Batches(banks, settings).of_step(step, *step_randomness(3, step))
        assert again.prompts == in_order[step].prompts
        assert torch.equal(again.latents_bchw, in_order[step].latents_bchw)


def test_no_two_steps_draw_the_same_numbers() -> None:
    drawn = [
        torch.rand(1, generator=step_randomness(seed, step)[1]).item()
        for seed in range(10)
        for step in range(200)
    ]
    assert len(set(drawn)) > 0.999 * len(drawn)


# Several concepts


def names(prompts: Sequence[str]) -> list[str]:
    return [prompt.split()[0] for prompt in prompts]


@pytest.mark.parametrize("size", [1, 3, 4])
def test_concepts_take_turns_within_and_across_batches(size: int) -> None:
    banks = [bank_of(2, name="cat "), bank_of(7, name="dog "), bank_of(3, name="mug ")]
    drawn = [p for b in draw_together(banks, config(batch_size=size), 24) for p in b.prompts]
    assert names(drawn) == ["cat", "dog", "mug"] * (8 * size)


def test_concepts_come_up_equally_often_however_many_images_they_have() -> None:
    banks = [bank_of(2, name="cat "), bank_of(7, name="dog ")]
    settings = config(batch_size=4)
    drawn = Counter(p for b in draw_together(banks, settings, 35) for p in b.prompts)
    assert [drawn[f"cat instance {n}"] for n in range(2)] == [35] * 2
    assert [drawn[f"dog instance {n}"] for n in range(7)] == [10] * 7


def test_regularization_sets_of_all_concepts_are_used_in_turn() -> None:
    banks = [bank_of(2, 3, name="cat "), bank_of(3, name="dog "), bank_of(2, 5, name="mug ")]
    drawn = draw_together(banks, config(batch_size=4), 30)
    prior = [prompt for batch in drawn for prompt in batch.prompts[2:]]
    assert all(batch.prior == 2 for batch in drawn)
    assert names(prior) == ["cat", "mug"] * 30
    assert {prompt.split()[1] for prompt in prior} == {"regularization"}
    assert [Counter(prior)[f"cat regularization {n}"] for n in range(3)] == [10] * 3
    assert [Counter(prior)[f"mug regularization {n}"] for n in range(5)] == [6] * 5


# Checks before any time is spent


class UnusedEncoder:
    def moments(self, image_chw: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("nothing may be encoded yet")


def test_preparing_gives_the_bank_and_tells_progress(models: DiffusersModels) -> None:
    progress: list[tuple[int, int]] = []
    prepared = prepare(
        concept(1, 2),
        config(),
        AveragingEncoder(),
        models.text_encoder,
        lambda done, total: progress.append((done, total)),
    )
    wanted = encode_views(concept(1, 2), AveragingEncoder(), config())
    assert progress[-1] == (10, 10)
    for view, wanted_view in zip(prepared.instances[0], wanted.instances[0], strict=True):
        assert view.prompt == wanted_view.prompt
        assert torch.equal(view.mean, wanted_view.mean)


def test_a_batch_of_one_has_no_place_for_regularization_images(models: DiffusersModels) -> None:
    with pytest.raises(ConfigError, match=r"batch_size=1 leaves no place .* Use 2 or more"):
        prepare(concept(1, 1), config(batch_size=1), UnusedEncoder(), models.text_encoder)


def test_unreadable_pictures_of_both_kinds_are_named_before_encoding(
    models: DiffusersModels, tmp_path: Path
) -> None:
    for name in ("instance.png", "ordinary.png"):
        (tmp_path / name).write_bytes(b"")
    broken = replace(
        concept(1, 0),
        images=(
            CaptionedImage(picture(), CAPTION),
            CaptionedImage(tmp_path / "instance.png", CAPTION),
        ),
        regularization=(CaptionedImage(tmp_path / "ordinary.png", "a cat"),),
    )
    with pytest.raises(DataError) as caught:
        prepare(broken, config(), UnusedEncoder(), models.text_encoder)
    assert "instance.png" in str(caught.value)
    assert "ordinary.png" in str(caught.value)


def test_an_unusable_initializer_is_refused_before_encoding(models: DiffusersModels) -> None:
    with pytest.raises(TokenError, match="one whole word is needed"):
        prepare(
            replace(concept(), initializer="xqzzvk"),
            config(),
            UnusedEncoder(),
            models.text_encoder,
        )


def test_a_token_that_the_text_encoder_knows_already_is_refused(models: DiffusersModels) -> None:
    known = models.text_encoder.with_tokens({"clip_l": {"<new1>": torch.zeros(1, 768)}})
    with pytest.raises(TokenError, match="already knows the trigger word <new1>"):
        prepare(concept(), config(), UnusedEncoder(), known)


@pytest.mark.parametrize("augment", [True, False])
def test_captions_are_refused_when_they_are_longer_than_any_chunks(
    models: DiffusersModels, augment: bool
) -> None:
    """With augmentation the words before the caption count as well; behind 75 tokens the trigger
    word is read like everything else."""
    words = models.text_encoder.with_tokens({"clip_l": {"<new1>": torch.zeros(1, 768)}})
    longest = max(len(words.tokenize_words(p)) for p in PREFIXES) if augment else 0
    fits = "cat " * (8 * 75 - 1 - longest) + "<new1>"
    settings = config(augment=augment)
    long = replace(concept(), images=(CaptionedImage(picture(), fits),))
    prepare(long, settings, AveragingEncoder(), models.text_encoder)
    longer = CaptionedImage(picture(), f"cat {fits}")
    guard = CaptionedImage(picture(), "cat " * (601 - longest))
    guarded = replace(long, regularization=(guard,))
    for wrong in (replace(long, images=(longer,)), guarded):
        with pytest.raises(DataError, match="601 tokens; 600 are the most .* Shorten it"):
            prepare(wrong, settings, UnusedEncoder(), models.text_encoder)


def test_repeats_are_weights_and_a_picture_is_encoded_once() -> None:
    """In every round each picture comes up as often as it has repeats, as if it were given that
    often.
    """
    weights = (1, 3, 10, 2)
    images = tuple(
        CaptionedImage(picture(n), f"{CAPTION} {n}", repeats=weight)
        for n, weight in enumerate(weights)
    )
    ordinary = tuple(
        CaptionedImage(picture(9 + n), f"cat {n}", repeats=weight)
        for n, weight in enumerate((4, 1))
    )
    taught = replace(concept(), images=images, regularization=ordinary)
    settings = config(augment=False, flip=False, batch_size=4)
    encoder = AveragingEncoder()
    bank = encode_views(taught, encoder, settings)
    assert encoder.calls == len(images) + len(ordinary)
    rounds = 5
    batches = draw(bank, settings, rounds * sum(weights) // 2)
    for prefix, counts, chosen in (
        (CAPTION, weights, [prompt for batch in batches for prompt in batch.prompts[:2]]),
        ("cat", (4, 1), [prompt for batch in batches for prompt in batch.prompts[2:]]),
    ):
        expected = {f"{prefix} {n}": count for n, count in enumerate(counts)}
        orders = [chosen[at : at + sum(counts)] for at in range(0, len(chosen), sum(counts))]
        full = [order for order in orders if len(order) == sum(counts)]
        assert len(full) >= rounds
        assert all(Counter(order) == expected for order in full)
        assert len({tuple(order) for order in full}) > 1


def test_without_repeats_the_order_is_the_one_it_always_was() -> None:
    """What was learnt with a seed must be learnt again with it."""
    settings = config(augment=False, flip=False, batch_size=2)
    taught = replace(
        concept(), images=tuple(CaptionedImage(picture(), f"{CAPTION} {n}") for n in range(5))
    )
    bank = encode_views(taught, AveragingEncoder(), settings)
    prompts = [prompt for batch in draw(bank, settings, 8, seed=3) for prompt in batch.prompts]
    assert [int(prompt[-1]) for prompt in prompts] == [
        *(2, 3, 4, 0, 1, 2, 1, 4, 0, 3, 1, 4, 0, 3, 2, 3)
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory")
@pytest.mark.slow
def test_a_thousand_repeats_cost_no_memory_and_no_time(tmp_path: Path) -> None:
    """Of 20 pictures, as a folder and as all that is drawn from."""
    (tmp_path / "1000_cat").mkdir()
    for number in range(20):
        picture(number).save(tmp_path / "1000_cat" / f"{number}.png")
    code = f"""
import random, time, torch
from pathlib import Path
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.data.training_concept import TrainingConcept
from custom_diffusion.trainer.data.folders import load_folder
from custom_diffusion.trainer.data.batches import Batches, step_randomness
from custom_diffusion.trainer.data.latents import encode_views

class Encoder:
    calls = 0
    def moments(self, image_chw):
        self.calls += 1
        return torch.zeros(4, 8, 8), torch.ones(4, 8, 8)

before, start = peak_mb(), time.perf_counter()
images = load_folder(Path({str(tmp_path)!r}), "a <new1> cat")
concept, encoder = TrainingConcept(images, "cat", "<new1>"), Encoder()
config = TrainConfig(resolution=64, augment=False)
bank = encode_views(concept, encoder, config)
for step in range(10):
    Batches([bank], config).of_step(step, *step_randomness(0, step))
print(len(images), encoder.calls, peak_mb() - before, time.perf_counter() - start)
"""
    pictures, calls, megabytes, seconds = map(float, run_python(code).split())
    assert (pictures, calls) == (20, 40)
    assert megabytes < 30
    assert seconds < 10


@pytest.mark.parametrize(("images", "each"), [(1, 16), (20, 16), (40, 8), (200, 2)])
def test_of_many_images_there_are_fewer_views_of_each(images: int, each: int) -> None:
    taught = replace(
        concept(), images=tuple(CaptionedImage(picture(n % 256), CAPTION) for n in range(images))
    )
    views = encode_views(taught, AveragingEncoder(), config(views_per_image=16))
    assert [len(of_one) for of_one in views.instances] == [each] * images
