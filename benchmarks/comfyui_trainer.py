"""A step of ours beside a step of ComfyUI's own trainer, on the same checkpoint in ComfyUI.

A random SD 1.5 of true size is loaded by ComfyUI's loader on the CPU. ComfyUI's side is its node
TrainLoraNode with the settings it comes with (bfloat16, rank 8, checkpointing on); ours is what
the job of CustomDiffusionTrain does, with bfloat16 as well, which it takes on a GPU, and without
checkpointing. Every turn is a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _measure import Times, options, peak_memory_gib, write_json
from _pack import ROOT

sys.path.append(str(ROOT / "tests"))  # the checkpoints and the server of the tests

import torch
from support.checkpoints import write_sd15
from support.comfy_server import find_comfyui

BATCHES = (1, 2, 4)
LATENT_EDGE = 16
SIDES = ("ours", "ComfyUI's", "ComfyUI's, no checkpointing")


def worker(side: str, batch: int, steps: int, checkpoint: Path) -> dict[str, float]:
    """Seconds of a step, the first not counted, and memory in GiB, all and above the model's."""
    _import_comfyui()
    import comfy.sd

    with torch.inference_mode():
        model, clip, _, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint))
        prompts = [f"photo number {number} of a cat" for number in range(batch)]
        conditions = [clip.encode_from_tokens_scheduled(clip.tokenize(p)) for p in prompts]
    loaded = peak_memory_gib()
    if side == "ours":
        ends = list(_ours(model, clip, batch, steps))
    else:
        ends = _comfyui(model, conditions, batch, steps, checkpointing=side == SIDES[1])
    gaps = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    return {"step_s": statistics.median(gaps), "all": peak_memory_gib(), "loaded": loaded}


def _import_comfyui() -> None:
    path = find_comfyui()
    if path is None:
        raise SystemExit("no ComfyUI: set COMFYUI_PATH to its folder")
    sys.path.insert(0, str(path))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True


def _comfyui(model: Any, conditions: list[Any], batch: int, steps: int, checkpointing: bool) -> Any:
    """When each step ended."""
    from comfy_extras import nodes_train

    ends: list[float] = []
    make = nodes_train._create_optimizer

    def with_clock(*args: Any) -> Any:
        optimizer = make(*args)
        optimizer.register_step_post_hook(lambda *_: ends.append(time.perf_counter()))
        return optimizer

    nodes_train._create_optimizer = with_clock
    settings = {
        "batch_size": batch,
        "grad_accumulation_steps": 1,
        "steps": steps,
        "learning_rate": 5e-4,
        "rank": 8,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "bf16",
        "lora_dtype": "bf16",
        "quantized_backward": False,
        "algorithm": next(iter(nodes_train.adapter_maps)),
        "gradient_checkpointing": checkpointing,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": False,
    }
    latents = {"samples": torch.randn(batch, 4, LATENT_EDGE, LATENT_EDGE)}
    with torch.inference_mode():
        nodes_train.TrainLoraNode.execute(
            [model], [latents], conditions, **{name: [value] for name, value in settings.items()}
        )
    return ends


def _ours(model: Any, clip: Any, batch: int, steps: int) -> Iterator[float]:
    from custom_diffusion.diffusion.latents import LATENT_PIXELS
    from custom_diffusion.diffusion.protocols import whole_picture
    from custom_diffusion.host.comfyui.models.text import text_encoder
    from custom_diffusion.host.comfyui.models.unet import ComfyDenoiser
    from custom_diffusion.trainer.config import TrainConfig
    from custom_diffusion.trainer.data.captioned import CaptionedImage
    from custom_diffusion.trainer.data.latents import EncodedView, LatentBank
    from custom_diffusion.trainer.data.training_concept import TrainingConcept
    from custom_diffusion.trainer.loop import train
    from PIL import Image

    edge = LATENT_EDGE * LATENT_PIXELS
    captions = [f"photo number {number} of a <new1> cat" for number in range(batch)]
    views = tuple(
        (
            EncodedView(
                torch.randn(4, LATENT_EDGE, LATENT_EDGE),
                torch.full((4, LATENT_EDGE, LATENT_EDGE), 0.1),
                torch.ones(LATENT_EDGE, LATENT_EDGE),
                caption,
                whole_picture(edge),
            ),
        )
        for caption in captions
    )
    picture = Image.new("RGB", (8, 8))  # never looked at: the latents are given
    pictures = tuple(CaptionedImage(picture, caption) for caption in captions)
    config = TrainConfig(steps=steps, batch_size=batch, resolution=edge, preview_every_steps=0)
    ends: list[float] = []
    denoiser, encoder = ComfyDenoiser(model, torch.bfloat16), text_encoder(clip)
    encoder.to(denoiser.device, denoiser.dtype)
    train(
        config,
        [TrainingConcept(pictures, "cat", "<new1>")],
        [LatentBank(views, ())],
        denoiser,
        encoder,
        on_event=lambda event: ends.append(time.perf_counter()),
    )
    yield from ends


def turn(side: str, batch: int, given: argparse.Namespace, checkpoint: Path) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--worker", side, "--batch", str(batch)]
    command += ["--checkpoint", str(checkpoint), "--steps", str(given.steps)]
    command += ["--threads", str(given.threads)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return json.loads(ended.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = options(__doc__ or "", threads=1, rounds=3)
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--checkpoint", type=Path, help="SD 1.5; a random one is made without")
    parser.add_argument(
        "--without-checkpointing", action="store_true", help="ComfyUI's in this way as well"
    )
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.worker:
        print(json.dumps(worker(given.worker, given.batch, given.steps, given.checkpoint)))
        return
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = given.checkpoint or write_sd15(
            Path(folder) / "sd15.safetensors", channel_mult=(1, 2, 4, 4)
        )
        print(f"SD 1.5, latents {LATENT_EDGE} x {LATENT_EDGE}, bfloat16, {given.threads} threads")
        for batch in BATCHES:
            sides = SIDES if given.without_checkpointing else SIDES[:2]
            turns: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
            for _ in range(given.rounds):
                for side in sides:
                    turns[side].append(turn(side, batch, given, checkpoint))
            times = Times({side: [t["step_s"] for t in each] for side, each in turns.items()})
            for side, each in turns.items():
                whole = statistics.median(t["all"] for t in each)
                above = statistics.median(t["all"] - t["loaded"] for t in each)
                faster = times.ratio(side, "ours")
                name = f"batch {batch}, {side}"
                results |= {f"{name}, s": times.median(side), f"{name}, ratio": faster}
                results |= {f"{name}, GiB": whole, f"{name}, GiB above": above}
                print(
                    f"  {name:42} {times.median(side):6.2f} s a step, {faster:4.2f} x ours, peak "
                    f"{whole:.2f} GiB, {above:.2f} above the loaded model's"
                )
    write_json(given.json, results)


if __name__ == "__main__":
    main()
