"""How close a training step comes to the arithmetic it cannot avoid.

The yardstick is the UNet's forward pass in the same type on the same machine: it needs no other
program, and the best possible ratio is known (docs/performance.md). Steps are those of the real
loop, `trainer.loop.train`, on given latents; a forward pass is timed after each.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import _pack  # noqa: F401  (puts the pack on the path)
import torch
from _measure import Times, options, peak_memory_gib, write_json
from _models import random_text_encoder, random_unet
from custom_diffusion.host.diffusers import DiffusersDenoiser
from custom_diffusion.trainer.config import LATENT_PIXELS, TrainConfig
from custom_diffusion.trainer.data import CaptionedImage, TrainingConcept, instance_caption
from custom_diffusion.trainer.latents import EncodedView, LatentBank
from custom_diffusion.trainer.loop import Event, train
from diffusers import DDPMScheduler
from PIL import Image

TOKEN, CLASS_NOUN = "<new1>", "cat"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def given_latents(edge: int, images: int) -> tuple[TrainingConcept, LatentBank]:
    """A concept whose views are already encoded, every one with the token in its prompt."""
    caption = instance_caption(TOKEN, CLASS_NOUN)
    generator = torch.Generator().manual_seed(0)

    def view() -> EncodedView:
        mean = torch.randn(4, edge, edge, generator=generator)
        return EncodedView(mean, torch.full_like(mean, 0.1), torch.ones(edge, edge), caption)

    picture = CaptionedImage(Image.new("RGB", (8, 8)), caption)  # never opened: latents are given
    concept = TrainingConcept((picture,) * images, CLASS_NOUN, TOKEN)
    return concept, LatentBank(tuple((view(),) for _ in range(images)), ())


class Stopwatch:
    """Listens to the loop; after every step it times one forward pass of the UNet alone.

    The pass runs inside the loop's own event, so steps and passes take turns. Its projections are
    the network's own, as nobody else would have any others.
    """

    def __init__(self, denoiser: DiffusersDenoiser, edge: int, batch_size: int) -> None:
        self._denoiser = denoiser
        generator = torch.Generator().manual_seed(1)
        self._latents = torch.randn(batch_size, 4, edge, edge, generator=generator)
        self._context = torch.randn(batch_size, 77, 768, generator=generator)
        self._timesteps = torch.full((batch_size,), 500)
        self._started = time.perf_counter()
        self.steps: list[float] = []
        self.forwards: list[float] = []

    def __call__(self, event: Event) -> None:
        self.steps.append(time.perf_counter() - self._started)
        start = time.perf_counter()
        with torch.no_grad(), self._own_projections():
            self._denoiser.predict(self._latents, self._timesteps, self._context)
        self._started = time.perf_counter()
        self.forwards.append(self._started - start)
