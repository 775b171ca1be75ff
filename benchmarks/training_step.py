"""How close a training step comes to the arithmetic it cannot avoid, and where its time goes.

The yardstick is the UNet's forward pass alone, in the same type, in the same process: it needs no
other program, and the least possible ratio follows from counting multiplications. Steps are those
of the real loop, `trainer.loop.train`, on given latents.

On Linux, glibc gives large blocks back to the system after every use, and fetching them again can
double the time of a step on the CPU. docs/performance.md has the settings that stop it.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice, pairwise
from typing import Any
from unittest import mock

import _pack  # noqa: F401  (puts the pack on the path)
import torch
from _measure import Times, options, peak_memory_gib, write_json
from _models import random_text_encoder, random_unet, random_vae
from custom_diffusion.diffusion.latents import LATENT_PIXELS
from custom_diffusion.diffusion.protocols import whole_picture
from custom_diffusion.host.clip.text_encoder import ClipTextEncoder
from custom_diffusion.host.diffusers.denoiser import DiffusersDenoiser, DiffusersLatentEncoder
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.data.captioned import CaptionedImage
from custom_diffusion.trainer.data.latents import EncodedView, LatentBank
from custom_diffusion.trainer.data.training_concept import TrainingConcept
from custom_diffusion.trainer.events import Event, StepDone
from custom_diffusion.trainer.learning.projections import DenseProjections
from custom_diffusion.trainer.learning.prompt_features import PromptText
from custom_diffusion.trainer.loop import train
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKEN = "<new1>"
CAPTIONS = (f"photo of a {TOKEN} cat", f"far away photo of a {TOKEN} cat")
"""One each for the two images of a batch, so that the text encoder has to see both."""
WARM_UP = 3
OF_REGULARIZATION = ("two cats on a chair", "a tabby cat sleeps in the sun")


class Stopwatch:
    """Seconds of every call of the functions it is put on, by the name of a part."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def on(self, owner: Any, function: str, part: str) -> Iterator[None]:
        own = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = own(*args, **kwargs)
            self.seconds.setdefault(part, []).append(time.perf_counter() - start)
            return result

        with mock.patch.object(owner, function, timed):
            yield


class Bench:
    """The loop on given latents, and its parts alone, for one type of frozen weights."""

    def __init__(
        self, dtype: torch.dtype, edge: int, pictures: int = 2, regularized: bool = False
    ) -> None:
        """`regularized`: as many pictures of the class as of the concept."""
        self._captions = list(islice(cycle(CAPTIONS), pictures))
        self._regularized = regularized
        self._denoiser = DiffusersDenoiser(random_unet(dtype), DDPMScheduler(), random_vae())
        self._text_encoder = random_text_encoder(dtype=dtype)
        self._edge = edge
        self._latents = torch.randn(pictures, 4, edge, edge)
        self._context = torch.randn(pictures, 77, self._text_encoder.context_width)

    def steps(self, count: int, **settings: Any) -> list[float]:
        """Seconds of each step after the first, which sets the optimiser up."""
        ends: list[float] = []

        def on_event(event: Event) -> None:
            if isinstance(event, StepDone):
                ends.append(time.perf_counter())

        concept, bank = self._given()
        config = TrainConfig(
            steps=count,
            batch_size=len(self._captions) * (2 if self._regularized else 1),
            resolution=self._edge * LATENT_PIXELS,
            preview_every_steps=0,
            **settings,
        )
        train(config, [concept], [bank], self._denoiser, self._text_encoder, on_event=on_event)
        return [end - start for start, end in pairwise(ends)]

    def parts(self, count: int) -> dict[str, float]:
        """Median seconds of a step and of its parts, the first steps not counted."""
        clock = Stopwatch()
        with (
            clock.on(ClipTextEncoder, "encode_with_pooled", "text encoder, forward"),
            clock.on(PromptText, "pass_on", "text encoder, backward"),
            clock.on(DenseProjections, "_keys_values", "keys and values, forward"),
            clock.on(self._denoiser, "predict", "UNet, forward"),
            clock.on(Tensor, "backward", "UNet, keys and values, backward"),
            clock.on(nn.utils, "clip_grad_norm_", "clipping"),
            clock.on(torch.optim.AdamW, "step", "update"),
        ):
            whole = statistics.median(self.steps(WARM_UP + count)[WARM_UP - 1 :])
        medians = {part: statistics.median(t[WARM_UP:]) for part, t in clock.seconds.items()}
        return {**medians, "all else": whole - sum(medians.values()), "step": whole}

    @torch.no_grad()
    def forward(self) -> None:
        self._denoiser.predict(self._latents, torch.tensor([500, 900]), self._context)

    def text(self) -> None:
        """Forward and backward pass of the text encoder, as a step with two captions needs it."""
        row = nn.Parameter(torch.zeros(1, self._text_encoder.context_width))
        encoder = self._text_encoder.with_tokens({"clip_l": {TOKEN: row}})
        encoder.encode(encoder.pad([encoder.tokenize(text) for text in CAPTIONS])).sum().backward()

    def _given(self) -> tuple[TrainingConcept, LatentBank]:
        def view(mean: Tensor, caption: str) -> EncodedView:
            mask = torch.ones(self._edge, self._edge)
            sizes = whole_picture(self._edge * LATENT_PIXELS)
            return EncodedView(mean, torch.full_like(mean, 0.1), mask, caption, sizes)

        picture = Image.new("RGB", (8, 8))  # never looked at: the latents are given
        captions = cycle(OF_REGULARIZATION) if self._regularized else ()
        pairs = zip(self._latents, self._captions, strict=True)
        return (
            TrainingConcept(
                tuple(CaptionedImage(picture, text) for text in self._captions), "cat", TOKEN
            ),
            LatentBank(
                tuple((view(mean, text),) for mean, text in pairs),
                tuple(view(*pair) for pair in zip(self._latents, captions, strict=False)),
            ),
        )


def measure(benches: dict[str, Bench], rounds: int) -> Times:
    """Each round runs a bench's parts once; a step's time is the median of a run's later ones."""
    seconds: dict[str, list[float]] = {
        f"{name}_{part}": [] for name in benches for part in ("forward", "text", "step")
    }
    for round_ in range(rounds + 1):  # the first round warms up
        for name, bench in benches.items():
            turn = {
                "forward": _seconds(bench.forward),
                "text": _seconds(bench.text),
                "step": statistics.median(bench.steps(4)),
            }
            if round_ > 0:
                for part, duration in turn.items():
                    seconds[f"{name}_{part}"].append(duration)
    return Times(seconds)


def count_flop(bench: Bench) -> dict[str, int]:
    """Floating-point operations of a step and of its parts, counted while they run."""
    counts = {}
    for name, run in (
        ("forward", bench.forward),
        ("text", bench.text),
        ("step", lambda: bench.steps(1)),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        counts[name] = counter.get_total_flops()
    return counts


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = options(__doc__ or "", threads=2, rounds=5)
    parser.add_argument("--edge", type=int, default=16, help="edge of the latents; 64 is 512 px")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    benches = {name: Bench(dtype, given.edge) for name, dtype in DTYPES.items()}
    flop = count_flop(benches["float32"])
    times = measure(benches, given.rounds)
    print(f"SD 1.5, batch {len(CAPTIONS)}, latents {given.edge} x {given.edge}, latents given")
    print(
        f"  GFLOP: forward {flop['forward'] / 1e9:.1f}, step {flop['step'] / 1e9:.1f} "
        f"(text encoder {flop['text'] / 1e9:.1f} of it): "
        f"step / forward {flop['step'] / flop['forward']:.2f}, "
        f"without text {(flop['step'] - flop['text']) / flop['forward']:.2f}"
    )
    results: dict[str, float] = {f"{part}_flop": count for part, count in flop.items()}
    for name in benches:
        parts = {part: times.median(f"{name}_{part}") for part in ("forward", "text", "step")}
        ratio = times.ratio(f"{name}_step", f"{name}_forward")
        results |= {f"{name}_{part}_s": seconds for part, seconds in parts.items()}
        results[f"{name}_ratio"] = ratio
        print(
            f"  {name:9} forward {parts['forward']:.3f} s, step {parts['step']:.3f} s "
            f"(text encoder alone {parts['text']:.3f} s): step / forward {ratio:.2f}"
        )
    picture = torch.rand(3, given.edge * LATENT_PIXELS, given.edge * LATENT_PIXELS) * 2 - 1
    encoder = DiffusersLatentEncoder(random_vae())
    encoder.moments(picture)
    results["view_s"] = _seconds(lambda: encoder.moments(picture))
    print(f"  before training, once for each view: autoencoder {results['view_s']:.3f} s (float32)")
    parts = benches["bfloat16"].parts(2 * given.rounds)
    for part, seconds in parts.items():
        results[f"bfloat16, {part}, s"] = seconds
        print(f"  bfloat16, {part:32} {1e3 * seconds:8.1f} ms {seconds / parts['step']:5.0%}")
    faster = times.ratio("float32_step", "bfloat16_step")
    results |= {"float32_over_bfloat16_step": faster, "peak_memory_gib": peak_memory_gib()}
    print(f"  bfloat16 step {faster:.2f} times as fast; peak memory {peak_memory_gib():.1f} GiB")
    write_json(given.json, results)


if __name__ == "__main__":
    main()
