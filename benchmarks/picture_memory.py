"""What photographs hold in memory: in the Concept node, in the Views node, and before a training.

Photographs are as large as a phone makes them and all different; an autoencoder is not needed, its
place is taken by an average. Each use runs in a process of its own, and what counts is how far its
resident memory rose above what it was before the first picture, at most. On Linux.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import _pack  # noqa: F401  (puts the pack on the path)
import numpy as np
import torch
from _measure import options, write_json
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.data.advice import advice
from custom_diffusion.trainer.data.captioned import CaptionedImage, check_readable
from custom_diffusion.trainer.data.contact_sheet import PictureSheet, contact_sheet
from custom_diffusion.trainer.data.folders import load_folder
from custom_diffusion.trainer.data.latents import encode_views
from custom_diffusion.trainer.data.training_concept import TrainingConcept
from PIL import Image
from torch import Tensor

WIDTH, HEIGHT = 6000, 4000
MARGIN = 400
CAPTION = "a <new1> cat"
MODES = {"jpg": "RGB", "png": "RGBA"}


class AveragingEncoder:
    """As large a latent as an autoencoder's, of nothing but averages."""

    def moments(self, image_chw: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.nn.functional.avg_pool2d(image_chw, 8)
        return torch.cat([mean, mean[:1]]), torch.ones(4, *mean.shape[1:])


def write_photographs(folder: Path, count: int, ending: str) -> None:
    """Pieces of one large scene: coarse shapes with grain, that pack as photographs do."""
    drawn = np.random.default_rng(0)
    coarse = Image.fromarray(drawn.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    size = (WIDTH + MARGIN, HEIGHT + MARGIN)
    scene = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    scene += drawn.integers(-6, 7, (size[1], size[0], 1), dtype=np.int16)
    large = Image.fromarray(scene.clip(0, 255).astype(np.uint8)).convert(MODES[ending])
    if ending == "png":
        large.putalpha(200)
    for number in range(count):
        left, top = 20 * (number % 20), 20 * (number // 20)
        piece = large.crop((left, top, left + WIDTH, top + HEIGHT))
        piece.save(folder / f"{number:03}.{ending}", quality=88, compress_level=1)


def show_concept(concept: TrainingConcept, config: TrainConfig) -> None:
    sheet = PictureSheet(concept)
    list(advice(concept, sheet.add))
    sheet.draw()


def encode(concept: TrainingConcept, config: TrainConfig) -> None:
    check_readable(concept.images)
    encode_views(concept, AveragingEncoder(), config)


USES: dict[str, Callable[[TrainingConcept, TrainConfig], object]] = {
    "concept": show_concept,
    "views": contact_sheet,
    "training": encode,
}


def measure(use: str, folder: Path, resolution: int) -> dict[str, float]:
    """MB above the start and seconds, of this process."""
    config = TrainConfig(resolution=resolution)
    tiny = TrainingConcept((CaptionedImage(Image.new("RGB", (64, 64)), CAPTION),), "cat", "<new1>")
    USES[use](tiny, TrainConfig(resolution=64))  # what libraries keep for themselves
    before, start = peak_mb(), time.perf_counter()
    USES[use](TrainingConcept(load_folder(folder, CAPTION), "cat", "<new1>"), config)
    return {"MB": peak_mb() - before, "seconds": time.perf_counter() - start}


def peak_mb() -> float:
    """Of this process alone: what `getrusage` says begins with the peak of the one before."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1.024e-3


def main() -> None:
    parser = options(__doc__ or "", threads=1, rounds=1)
    parser.add_argument("--count", type=int, default=200, help="photographs of 24 megapixels")
    parser.add_argument("--ending", choices=MODES, default="jpg")
    parser.add_argument("--resolution", type=int, default=512, help="of the training")
    parser.add_argument("--use", choices=USES, help="this one alone")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.folder:
        print(json.dumps(measure(chosen.use, chosen.folder, chosen.resolution)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), chosen.count, chosen.ending)
        for use in [chosen.use] if chosen.use else USES:
            command = [sys.executable, __file__, "--use", use, "--folder", folder]
            command += ["--resolution", str(chosen.resolution), "--threads", str(chosen.threads)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ)
            results[use] = json.loads(done.stdout)
            print(f"{use:10} {results[use]['MB']:8.0f} MB {results[use]['seconds']:8.1f} s")
    write_json(chosen.json, {"count": chosen.count, "ending": chosen.ending, "uses": results})


if __name__ == "__main__":
    main()
