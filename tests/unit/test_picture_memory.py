"""However many photographs a folder holds, and however often each counts, a few are in memory."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.children import run_python

WIDTH, HEIGHT = 6000, 4000
MOST_MB = 400

USE = """
from pathlib import Path
from PIL import Image
import torch
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.data.advice import advice
from custom_diffusion.trainer.data.captioned import CaptionedImage, check_readable
from custom_diffusion.trainer.data.contact_sheet import PictureSheet, contact_sheet
from custom_diffusion.trainer.data.folders import load_folder
from custom_diffusion.trainer.data.latents import encode_views
from custom_diffusion.trainer.data.training_concept import TrainingConcept

class Encoder:
    def moments(self, image_chw):
        mean = torch.nn.functional.avg_pool2d(image_chw, 8)
        return torch.cat([mean, mean[:1]]), torch.ones(4, *mean.shape[1:])

def use(images):
    concept = TrainingConcept(images, "cat", "<new1>")
    config = TrainConfig(resolution=256, augment=False, flip=False)
    sheet = PictureSheet(concept)
    list(advice(concept, sheet.add))
    sheet.draw()
    contact_sheet(concept, config)
    check_readable(concept.images)
    encode_views(concept, Encoder(), config)
"""


def write_photographs(folder: Path, count: int, ending: str) -> None:
    """Of 24 megapixels, all different, that pack well; PNGs are half transparent."""
    folder.mkdir()
    small = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    scene = Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    if ending == "png":
        scene.putalpha(200)
    for number in range(count):
        scene.paste("red", (0, 0, 100 * (number + 1), 100))
        scene.save(folder / f"{number}.{ending}", quality=80, compress_level=1)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory")
@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.slow
def test_photographs_are_decoded_one_at_a_time(ending: str, tmp_path: Path) -> None:
    """Shown, looked through and encoded: the peak stands still from the second picture on."""
    write_photographs(tmp_path / "100_cat", 3, ending)
    code = f"""{USE}
use((CaptionedImage(Image.new("RGB", (64, 64)), "a <new1> cat"),))
before = peak_mb()
images = load_folder(Path({str(tmp_path)!r}), "a <new1> cat")
use(images[:2])
two = peak_mb()
use(images)
print(len(images), images[0].repeats, two - before, peak_mb() - two)
"""
    count, repeats, megabytes, more = map(float, run_python(code).split())
    assert (count, repeats) == (3, 100)
    assert megabytes < MOST_MB
    assert more < 40
