"""Captions that vary from step to step, and trigger words that are put into them."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from custom_diffusion.concept.errors import ConfigError, DataError
from custom_diffusion.host.diffusers.lending import borrowed_models
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.data.advice import advice
from custom_diffusion.trainer.data.batches import Batches, step_randomness
from custom_diffusion.trainer.data.captioned import CaptionedImage
from custom_diffusion.trainer.data.folders import load_folder
from custom_diffusion.trainer.data.wording import Wording, with_trigger, worded
from custom_diffusion.trainer.prepare import prepare
from PIL import Image
from support.tiny_models import RESOLUTION, cat_concept, random_bank, tiny_pipeline

PLAIN = "photo of a <new1> cat"
TAGS = "<new1> cat, red, on a table, indoors"
WORDING = Wording("close up", (TAGS, "a <new1> cat asleep"), PLAIN)


def drawn(count: int = 400, wording: Wording = WORDING, **settings: object) -> Counter[str]:
    rng = random.Random(0)
    config = TrainConfig(**settings)  # type: ignore[arg-type]
    return Counter(worded(wording, config, rng) for _ in range(count))


def test_the_first_caption_or_any() -> None:
    assert drawn() == {f"close up {TAGS}": 400}
    both = drawn(caption_lines="any")
    assert both.keys() == {f"close up {TAGS}", "close up a <new1> cat asleep"}
    assert min(both.values()) > 150


def test_parts_are_shuffled_behind_those_that_stay() -> None:
    found = drawn(shuffle_captions=True, keep_parts=1)
    assert len(found) == 6 and min(found.values()) > 35, "all orders of three"
    for caption in found:
        first, *rest = caption.removeprefix("close up ").split(", ")
        assert first == "<new1> cat" and sorted(rest) == ["indoors", "on a table", "red"]
    assert len(drawn(shuffle_captions=True, keep_parts=0)) == 24
    assert len(drawn(shuffle_captions=True, keep_parts=9)) == 1


def test_captions_are_left_out_or_plain_as_often_as_it_is_set() -> None:
    found = drawn(2000, caption_dropout=0.2, plain_captions=0.5)
    shares = {caption: count / 2000 for caption, count in found.items()}
    assert shares[""] == pytest.approx(0.2, abs=0.04)
    assert shares[f"close up {PLAIN}"] == pytest.approx(0.4, abs=0.04)
    assert shares[f"close up {TAGS}"] == pytest.approx(0.4, abs=0.04)


def test_a_step_is_as_ever_where_nothing_varies_and_regularization_always() -> None:
    concept = cat_concept(2, regularization=2)
    bank = random_bank(concept)
    views = tuple(
        tuple(replace(view, wording=Wording("", (TAGS,), PLAIN)) for view in of_picture)
        for of_picture in bank.instances
    )
    bank = replace(bank, instances=views)
    config = TrainConfig(batch_size=4, resolution=RESOLUTION)
    for step in range(4):
        as_ever, plain = (
            Batches([bank], settings).of_step(step, *step_randomness(0, step))
            for settings in (config, replace(config, plain_captions=1.0))
        )
        assert all(TAGS not in prompt for prompt in as_ever.prompts)
        assert plain.prompts[:2] == (PLAIN, PLAIN)
        assert plain.prompts[2:] == as_ever.prompts[2:]


def test_lines_of_a_caption_file_are_its_choices(tmp_path: Path) -> None:
    for name, text in (("one", "a <new1> cat"), ("two", "a <new1> cat\n\n<new1> cat, red\n")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    one, two = load_folder(tmp_path, PLAIN)
    assert one.captions == ("a <new1> cat",) and one.choices == ()
    assert two.caption == "a <new1> cat" and two.captions == ("a <new1> cat", "<new1> cat, red")


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("photo of a <new1> cat", "photo of a <new1> cat"),
        ("A cat on a mat, concatenated", "A <new1> cat on a mat, concatenated"),
        ("concatenated, Cat", "concatenated, <new1> Cat"),
        ("red, indoors", "<new1> cat, red, indoors"),
    ],
)
def test_trigger_words_are_put_where_they_lack(caption: str, expected: str) -> None:
    (image,) = with_trigger([CaptionedImage(Path("a.png"), caption)], "<new1>", "cat")
    assert image.caption == expected
    assert image.trigger_added == (caption != expected)
    (plain,) = with_trigger([CaptionedImage(Path("a.png"), caption)], "", "cat")
    assert plain.caption == caption


def test_it_is_said() -> None:
    picture = Image.new("RGB", (300, 300))
    images = with_trigger(
        [CaptionedImage(picture, "a cat"), CaptionedImage(picture, PLAIN)], "<new1>", "cat"
    )
    said = list(advice(replace(cat_concept(), images=images)))
    assert any("put into captions without it: picture 1 ('a <new1> cat')" in one for one in said)


def test_what_teaches_nothing_or_is_too_long_is_refused() -> None:
    with borrowed_models(tiny_pipeline()) as models:
        parts = models.latent_encoder, models.text_encoder
        config = TrainConfig(caption_dropout=0.1, resolution=RESOLUTION, augment=False)
        with pytest.raises(ConfigError, match="own words' learns nothing"):
            prepare(cat_concept(), config, *parts)
        prepare(cat_concept(), replace(config, gradient_cut="start"), *parts)
        shuffled = TrainConfig(shuffle_captions=True, resolution=RESOLUTION, augment=False)
        for parts_behind, fits in ((60, True), (310, False)):
            long = "<new1> cat, " + ", ".join(["red"] * parts_behind)
            images = tuple(replace(image, caption=long) for image in cat_concept().images)
            with nullcontext() if fits else pytest.raises(DataError, match="622 tokens; 600 are"):
                prepare(replace(cat_concept(), images=images), shuffled, *parts)
