"""Advice names what a user may want to mend, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from custom_diffusion.concept.errors import DataError
from custom_diffusion.trainer.data.advice import advice
from custom_diffusion.trainer.data.captioned import CaptionedImage
from custom_diffusion.trainer.data.training_concept import TrainingConcept
from PIL import Image, ImageFilter

OWN = "a <new1> cat on a sofa"


def scene(seed: int, edge: int = 300) -> Image.Image:
    """Large shapes, as in photographs: scaling does not change which side is the lighter."""
    shades = np.random.default_rng(seed).integers(0, 256, (9, 9), dtype=np.uint8)
    return Image.fromarray(shades).resize((edge, edge), Image.Resampling.BICUBIC)


def textured(seed: int) -> Image.Image:
    """The same with fur: detail in each pixel."""
    fur = np.random.default_rng(seed).normal(0, 25, (600, 600))
    shades = np.asarray(scene(seed, 600), np.float32) + fur
    return Image.fromarray(shades.clip(0, 255).astype(np.uint8))


def next_shot(picture: Image.Image) -> Image.Image:
    """The camera a little further to the right."""
    return picture.crop((4, 0, picture.width, picture.height - 4))


def cats(*pictures: Image.Image, caption: str = OWN) -> TrainingConcept:
    return TrainingConcept(
        images=tuple(CaptionedImage(picture, caption) for picture in pictures),
        class_noun="cat",
        token="<new1>",
        regularization=(CaptionedImage(scene(99), "a cat"),),
    )


GOOD = cats(*(scene(seed) for seed in range(5)))


def test_of_good_pictures_nothing_is_said() -> None:
    assert list(advice(GOOD)) == []
    assert (
        list(advice(cats(*(scene(seed) for seed in range(4)), caption="photo of a <new1> cat")))
        == []
    )


def test_captions_that_clip_reads_to_the_end_are_not_long() -> None:
    """75 words, and the new word is one of them."""
    longest = f"{OWN}{', red' * 34}"
    assert list(advice(cats(*(scene(seed) for seed in range(4)), caption=longest))) == []
    assert list(advice(cats(*(scene(seed) for seed in range(4)), caption=f"{OWN} (red) [a]"))) == []


def test_all_that_cannot_be_read_is_named_at_once(tmp_path: Path) -> None:
    broken = []
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"nothing")
        broken.append(CaptionedImage(tmp_path / name, OWN))
    with pytest.raises(DataError) as caught:
        list(advice(replace(GOOD, images=(*GOOD.images, *broken))))
    assert "a.png" in str(caught.value) and "b.png" in str(caught.value)


def test_repeats_make_no_more_pictures_of_few() -> None:
    """Nor does a picture with repeats look the same as itself."""
    few = cats(*(scene(seed) for seed in range(3)))
    many = replace(few, images=tuple(replace(image, repeats=100) for image in few.images))
    (said,) = advice(many)
    assert "3 pictures are few" in said


@pytest.mark.parametrize(
    "concept, words",
    [
        (cats(*(scene(seed) for seed in range(3))), "3 pictures are few"),
        (
            cats(*(scene(s) for s in range(4)), scene(4, edge=120)),
            "its blur is learnt: picture 5 (120 x 120 pixels).",
        ),
        (
            cats(*(scene(s) for s in range(4)), scene(2).resize((450, 450))),
            "picture 5 looks the same as picture 3",
        ),
        (
            cats(*(scene(s) for s in range(4)), next_shot(scene(2))),
            "picture 5 looks nearly the same as picture 3",
        ),
        (
            cats(*(textured(s) for s in range(4)), textured(4).filter(ImageFilter.GaussianBlur(6))),
            "Blurred next to the others, and blur is learnt: picture 5.",
        ),
        (
            cats(*(scene(s) for s in range(4)), scene(4).resize((1400, 300))),
            "only the middle is learnt; crop it to what counts: picture 5 (1400 x 300 pixels).",
        ),
        (replace(GOOD, token="", regularization=()), "no regularization pictures"),
        (
            cats(*(scene(seed) for seed in range(4)), caption=f"{OWN}{', red' * 37}"),
            "read in parts, as ComfyUI does: picture 1, picture 2, picture 3 and 1",
        ),
        *(
            (
                cats(*(scene(seed) for seed in range(4)), caption=f"{OWN}, {odd}"),
                f"this is learnt as it stands: {odd!r} (picture 1)",
            )
            for odd in ("(red:1.3)", "{red|blue}", "<lora:cat:1>", "__colour__")
        ),
        (
            replace(
                GOOD,
                images=(replace(GOOD.images[0], caption="photo of a <new1> cat"), *GOOD.images[1:]),
            ),
            "Without a caption of their own: picture 1. They get 'photo of a <new1> cat'",
        ),
    ],
)
def test_each_trouble_is_named_alone(concept: TrainingConcept, words: str) -> None:
    (said,) = advice(concept)
    assert words in said
