"""Seg-Mix: what is pasted where, what the caption says, how often it comes up."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch
from custom_diffusion.concept.errors import ConfigError
from custom_diffusion.concept.prompts import STYLE_TEMPLATE
from custom_diffusion.host.diffusers.lending import borrowed_models
from custom_diffusion.trainer.checkpoint import Checkpoint
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.data.batches import Batches, step_randomness
from custom_diffusion.trainer.data.captioned import CaptionedImage
from custom_diffusion.trainer.data.latents import LatentBank, encode_views
from custom_diffusion.trainer.data.mixing import VIEWS, mixable, mixed_views, with_mixed
from custom_diffusion.trainer.data.training_concept import TrainingConcept
from custom_diffusion.trainer.events import CheckpointDue, Event
from custom_diffusion.trainer.request import TrainingRequest
from custom_diffusion.trainer.teach import prepared
from PIL import Image
from support.tiny_models import RESOLUTION, AveragingEncoder, random_bank, tiny_pipeline
from torch import Tensor

RED, BLUE = (230, 20, 20), (20, 20, 230)
SIZE = 128
SQUARE = [(SIZE, SIZE)]
CONFIG = TrainConfig(seg_mix=0.3, resolution=SIZE, batch_size=4, preview_every_steps=0)


def thing(token: str, noun: str, colour: tuple[int, int, int], images: int = 2) -> TrainingConcept:
    """A coloured box of 60 x 40 pixels on white, and its mask."""
    pictures = []
    for number in range(images):
        box = (30 + number, 20, 90 + number, 60)
        picture = Image.new("RGB", (160, 100), (255, 255, 255))
        picture.paste(colour, box)
        mask = Image.new("L", (160, 100))
        mask.paste(255, box)
        pictures.append(CaptionedImage(picture, f"photo of a {token} {noun}", mask))
    return TrainingConcept(tuple(pictures), noun, token)


CAT, DOG = thing("<new1>", "cat", RED), thing("<new2>", "dog", BLUE)


def pixels(image_chw: Tensor) -> Tensor:
    return ((image_chw + 1) * 127.5).round()


def test_each_subject_is_where_its_mask_says_and_nothing_else_is() -> None:
    seen = list(mixed_views(CAT, DOG, CONFIG, 20, SQUARE))
    lefts = set()
    for one in seen:
        assert one.prompt == "photo of a <new1> cat and a <new2> dog"
        image = pixels(one.view.image_chw)
        cat, dog = one.subject_masks["<new1> cat"], one.subject_masks["<new2> dog"]
        for mask, colour in ((cat, RED), (dog, BLUE)):
            cells = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
            wholly = image[:, cells > 0.999]
            wanted = torch.tensor(colour).float()[:, None]
            assert wholly.numel() and (wholly - wanted).abs().max() <= 2
        assert (cat + dog).max() <= 1.01
        torch.testing.assert_close(one.view.mask, (cat + dog).clamp(max=1))
        nowhere = (cat + dog == 0).repeat_interleave(8, 0).repeat_interleave(8, 1)
        assert (image[:, nowhere] == 128).all() and nowhere.any()
        lefts.add(bool(cat.sum(0).argmax() < dog.sum(0).argmax()))
        assert one.view.sizes == (SIZE, SIZE, 0, 0, SIZE, SIZE)
    assert lefts == {True, False}


def test_subjects_are_as_large_as_it_is_set() -> None:
    settings = replace(CONFIG, seg_mix_smallest=0.5, seg_mix_largest=0.6)
    widths = [
        int((pixels(one.view.image_chw)[0] > 180).any(0).sum())
        for one in mixed_views(CAT, DOG, settings, 20, SQUARE)
    ]
    assert 0.5 * SIZE / 2 - 2 <= max(widths) <= 0.6 * SIZE / 2 + 2  # some are partly hidden


def test_views_follow_from_the_seed_and_the_two_concepts() -> None:
    first = list(mixed_views(CAT, DOG, CONFIG, 6, SQUARE))
    again = list(islice(mixed_views(CAT, DOG, CONFIG, 40, SQUARE), 6))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.view.image_chw, other.view.image_chw)
    other = next(mixed_views(CAT, DOG, replace(CONFIG, seed=1), 1, SQUARE))
    assert not torch.equal(first[0].view.image_chw, other.view.image_chw)


def test_pictures_that_are_kept_back_are_in_no_view() -> None:
    marked = replace(CAT.images[1], source=Image.new("RGB", (160, 100), (20, 230, 20)))
    for seed in range(4):
        settings = replace(CONFIG, validation_pictures=1, seed=seed)
        concept = replace(CAT, images=(CAT.images[0], marked))
        found = {
            bool((pixels(one.view.image_chw)[1] > 200).any())
            for one in mixed_views(concept, DOG, settings, 8, SQUARE)
        }
        assert len(found) == 1, "always the one or always the other"


def test_what_cannot_be_mixed_is_refused() -> None:
    bare = replace(DOG, images=tuple(replace(image, mask=None) for image in DOG.images))
    for concepts, names in (([CAT], "<new1> cat"), ([CAT, bare], "<new1> cat"), ([bare], "none")):
        with pytest.raises(ConfigError, match=f"two things.*such are here: {names}"):
            mixable(concepts, CONFIG)
    style = replace(DOG, template=STYLE_TEMPLATE)
    with pytest.raises(ConfigError, match="two things"):
        mixable([CAT, style], CONFIG)
    assert mixable([bare, CAT, DOG], CONFIG) == [CAT, DOG]
    with pytest.raises(ConfigError, match="Swap them"):
        mixable([CAT, DOG], replace(CONFIG, seg_mix_smallest=0.9, seg_mix_largest=0.5))


class FlatEncoder:
    def moments(self, image_chw: Tensor) -> tuple[Tensor, Tensor]:
        edge = image_chw.shape[-1] // 8
        return torch.full((4, edge, edge), 7.0), torch.zeros(4, edge, edge)


def banks() -> list[LatentBank]:
    return [random_bank(concept, edge=SIZE // 8, seed=n) for n, concept in enumerate((CAT, DOG))]


def drawn(banks: list[LatentBank], config: TrainConfig, step: int) -> tuple[Tensor, list[str]]:
    batch = Batches(banks, config).of_step(step, *step_randomness(config.seed, step))
    return batch.latents_bchw, list(batch.prompts)


def test_they_come_up_as_often_as_it_is_set_and_change_nothing_at_zero() -> None:
    mixed = with_mixed(banks(), [CAT, DOG], CONFIG, FlatEncoder())
    assert [len(bank.mixed) for bank in mixed] == [VIEWS, VIEWS]
    count = 0
    for step in range(200):
        _, prompts = drawn(mixed, CONFIG, step)
        count += sum(" and a " in prompt for prompt in prompts)
    assert 0.25 < count / 800 < 0.35
    off = replace(CONFIG, seg_mix=0.0)
    for step in range(5):
        latents, prompts = drawn(banks(), off, step)
        assert drawn(mixed, replace(CONFIG, seg_mix=1.0), step)[1] != prompts
        again, same = drawn(banks(), CONFIG, step)
        assert torch.equal(latents, again) and prompts == same, "without mixed views"


def test_a_training_with_them_resumes_to_the_bit() -> None:
    pipeline = tiny_pipeline()
    config = replace(
        CONFIG, seg_mix=0.7, steps=4, resolution=RESOLUTION, learning_rate=1e-3, augment=False
    )
    kept: list[Checkpoint] = []

    def keep(event: Event) -> None:
        if isinstance(event, CheckpointDue) and event.checkpoint.step == 2:
            one = event.checkpoint
            parameters = tuple(parameter.clone() for parameter in one.parameters)
            moments = tuple({k: v.clone() for k, v in m.items()} for m in one.moments)
            kept.append(replace(one, parameters=parameters, moments=moments))

    def learnt(checkpoint: Checkpoint | None = None) -> dict[str, Tensor]:
        with borrowed_models(pipeline) as models:
            parts = models.denoiser, models.text_encoder
            run = prepared(TrainingRequest(config, [CAT, DOG]), *parts, models.latent_encoder)
            concept = run(*parts, checkpoint=checkpoint, checkpoint_every_steps=2, on_event=keep)
        return {layer: delta.dense() for layer, delta in concept.deltas.items()}

    whole = learnt()
    resumed = learnt(kept[0])
    assert all(torch.equal(resumed[layer], dense) for layer, dense in whole.items())


def test_pictures_of_several_shapes_are_mixed_in_the_frames_that_they_have() -> None:
    """A step sees one frame, mixed views too, and they come as often as asked for."""
    settings = replace(CONFIG, seg_mix=0.5, resolution=128, augment=False, flip=False)
    tall = replace(DOG, images=tuple(stretched(image) for image in DOG.images))
    encoder = AveragingEncoder()
    plain = [encode_views(one, encoder, settings) for one in (CAT, tall)]
    batches = Batches(with_mixed(plain, (CAT, tall), settings, encoder), settings)
    assert {*batches.pictures} == {(128, 128), (64, 192)}
    mixed = 0
    for step in range(100):
        batch = batches.of_step(step, *step_randomness(0, step))
        assert len({tuple(sizes[4:].tolist()) for sizes in batch.sizes}) == 1
        mixed += sum(" and a " in prompt for prompt in batch.prompts)
    assert 0.4 < mixed / 400 < 0.6


def stretched(image: CaptionedImage) -> CaptionedImage:
    picture = image.open()
    assert picture.mask is not None
    tall = SIZE, 3 * SIZE
    return replace(image, source=picture.image.resize(tall), mask=picture.mask.resize(tall))
