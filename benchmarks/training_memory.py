"""What a training step keeps in memory, counted, and what of it fits on a GPU.

Models are built on torch's meta device, where tensors have shapes and no contents, so that no GPU
is needed and nothing is computed. Counted are the frozen weights, what is trained with its
gradients and Adam's two means, and what autograd keeps of a forward pass. With checkpointing that
is the blocks' inputs and the inside of the largest block. Not counted: the scratch space of single
operations, CUDA's own, the autoencoder, and the model that ComfyUI keeps for sampling.

With --measured, steps of SD 1.5 at 512 px are made on the CPU as well, each in a process of its
own, and its resident memory stands beside what was counted. On Linux with glibc, whose habit of
keeping what was freed is turned off for it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import _pack  # noqa: F401  (puts the pack on the path)
import torch
import torch.nn.functional as F
from _measure import options, write_json
from _models import random_text_encoder
from custom_diffusion.host.diffusers import DiffusersDenoiser
from custom_diffusion.trainer.backward import checkpointed
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.frozen_layers import keeping_less
from custom_diffusion.trainer.methods import METHODS
from custom_diffusion.trainer.projections import KeyValueProjections
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from training_step import Bench

FROZEN = torch.bfloat16
GIB = 2**30
CARDS_GIB = (6, 8, 12, 24)
ASIDE_GIB = 1.0
"""For CUDA and for the scratch space of single operations."""
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""With these glibc returns what is freed, and resident memory is what is in use."""
STATE_BYTES = {"adamw": 8, "adamw 8-bit": 2}
"""Of Adam's two means, for each number that learns."""


@dataclass(frozen=True)
class Shape:
    """A model of true shape and the size it is trained at."""

    latent_edge: int
    text_parameters: float
    """Of its text encoders; they are float32 and not built here."""
    unet: dict[str, Any]


_WIDE = {"use_linear_projection": True}
MODELS = {
    "SD 1.5, 512 px": Shape(64, 123e6, {"cross_attention_dim": 768, "attention_head_dim": 8}),
    "SD 2.1, 768 px": Shape(
        96, 340e6, {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), **_WIDE}
    ),
    "SDXL, 1024 px": Shape(
        128,
        817e6,
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            **_WIDE,
        },
    ),
}
TEXT_ON_CPU = {"text_encoder_on_cpu": True}
EIGHT_BIT = {"optimizer": "adamw 8-bit"}
LOW_RANK = {"method": "low-rank", "rank": 16}
SETTINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "custom diffusion": ({}, False),
    "8-bit optimiser": (EIGHT_BIT, False),
    "text encoders on the CPU": (TEXT_ON_CPU, False),
    "UNet loaded in float8": ({}, True),
    "all three": ({**EIGHT_BIT, **TEXT_ON_CPU}, True),
    "low-rank 16": (LOW_RANK, False),
    "low-rank 16, text encoders on the CPU": ({**LOW_RANK, **TEXT_ON_CPU}, False),
    "and UNet loaded in float8": ({**LOW_RANK, **TEXT_ON_CPU}, True),
}
"""Of the training, and whether matrices of the UNet lie in 8 bits"""


@dataclass(frozen=True)
class Memory:
    """GiB. What is kept grows with the pictures that are computed at once."""

    frozen: float
    trained: float
    kept: tuple[float, float]
    """For one picture, and for each further one."""
    kept_checkpointed: tuple[float, float]

    def all(self, pictures: int, checkpointing: bool = False) -> float:
        first, further = self.kept_checkpointed if checkpointing else self.kept
        return self.frozen + self.trained + first + (pictures - 1) * further

    def fits(self, card_gib: float, checkpointing: bool) -> int:
        """How many pictures at once."""
        _, further = self.kept_checkpointed if checkpointing else self.kept
        left = card_gib - ASIDE_GIB - self.all(1, checkpointing)
        return 0 if left < 0 else 1 + int(left / further)


class Kept:
    """What autograd keeps for the backward pass, each storage once, and no weight."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.bytes = 0
        self._storages = {weight.untyped_storage()._cdata: weight for weight in weights}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = tensor  # held, so that no address comes twice
            self.bytes += storage.nbytes()
        return tensor


class Counted:
    """A model on the meta device, and what a step on it keeps."""

    def __init__(self, shape: Shape) -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(FROZEN)
        with torch.device("meta"):
            unet = UNet2DConditionModel(**shape.unet).eval().requires_grad_(False)
        torch.set_default_dtype(before)
        self._shape = shape
        self._denoiser = DiffusersDenoiser(unet, DDPMScheduler(), vae=None)

    def memory(self, config: TrainConfig, float8: bool) -> Memory:
        projections = METHODS[config.method].projections(self._denoiser, {}, config)
        frozen = sum(
            weight.numel() if float8 and weight.ndim > 1 else weight.nbytes
            for weight in self._denoiser.network.parameters()
        )
        if not config.text_encoder_on_cpu:
            frozen += int(4 * self._shape.text_parameters)
        numbers = sum(parameter.numel() for parameter in projections.parameters())
        trained = numbers * (4 + 4 + STATE_BYTES[config.optimizer])  # weights and gradients
        trained += sum(t.nbytes for t in _tensors(projections) if not t.requires_grad)
        return Memory(
            frozen / GIB,
            trained / GIB,
            self._one_and_further(lambda n: self._kept(projections, n, ())),
            self._one_and_further(
                lambda n: (
                    self._kept(projections, n, self._denoiser.blocks)
                    + max(self._inside_of_blocks(projections, n))
                )
            ),
        )

    def _one_and_further(self, kept: Any) -> tuple[float, float]:
        one, two = kept(1) / GIB, kept(2) / GIB
        return one, two - one

    def _kept(self, projections: KeyValueProjections, pictures: int, blocks: Any) -> int:
        with checkpointed(self._denoiser.network, blocks), self._counted(projections) as kept:
            self._predict(projections, pictures)
        return kept.bytes

    def _inside_of_blocks(self, projections: KeyValueProjections, pictures: int) -> list[int]:
        """What each block keeps, when nothing is checkpointed."""
        before: dict[Any, int] = {}
        sizes: list[int] = []
        with self._counted(projections) as kept, ExitStack() as hooks:
            for path in self._denoiser.blocks:
                block = self._denoiser.network.get_submodule(path)
                begin = block.register_forward_pre_hook(lambda b, _: before.update({b: kept.bytes}))
                end = block.register_forward_hook(
                    lambda b, *_: sizes.append(kept.bytes - before[b])
                )
                hooks.callback(begin.remove)
                hooks.callback(end.remove)
            self._predict(projections, pictures)
        return sizes

    @contextmanager
    def _counted(self, projections: KeyValueProjections) -> Iterator[Kept]:
        kept = Kept([*self._denoiser.network.parameters(), *_tensors(projections)])
        with (
            mock.patch.object(F, "scaled_dot_product_attention", _fused_attention),
            torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor),
        ):
            yield kept

    def _predict(self, projections: KeyValueProjections, pictures: int) -> None:
        """With a context that learns: the graph stays until the counting is over."""
        edge, family = self._shape.latent_edge, self._denoiser.family
        with torch.device("meta"):
            latents = torch.empty(pictures, 4, edge, edge)
            timesteps = torch.empty(pictures, dtype=torch.long)
            context = torch.empty(pictures, 77, family.context_width, requires_grad=True)
            pooled = torch.empty(pictures, family.pooled_width, requires_grad=True)
            sizes = torch.empty(pictures, 6, dtype=torch.long)
        with projections.installed(), keeping_less(self._denoiser.network):
            projections.predict(latents, timesteps, context, pooled, sizes)


def _tensors(projections: KeyValueProjections) -> list[Tensor]:
    return [value for value in vars(projections).values() if isinstance(value, Tensor)]


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Attention as a GPU computes it, without the square of positions in memory."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value)[0]  # type: ignore[no-any-return]


def grown_gib(pictures: int, checkpointing: bool) -> float:
    """What the resident memory of this process grows by in two steps of SD 1.5 at 512 px."""
    bench = Bench(FROZEN, MODELS["SD 1.5, 512 px"].latent_edge, random_text_encoder(), pictures)
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    bench.steps(2, gradient_checkpointing=checkpointing)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / GIB


def measured(pictures: int, checkpointing: bool, threads: int) -> float:
    """The same, in a process of its own."""
    command = [sys.executable, __file__, "--worker", str(pictures), "--threads", str(threads)]
    command += ["--checkpointing"] if checkpointing else []
    environment = {**os.environ, **GIVES_BACK}
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return float(ended.stdout.splitlines()[-1])


def main() -> None:
    parser = options(__doc__ or "", threads=2, rounds=1)
    parser.add_argument("--measured", action="store_true", help="and steps on the CPU (minutes)")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.worker:
        print(grown_gib(given.worker, given.checkpointing))
        return
    counted: dict[str, dict[str, Memory]] = {}
    for model, shape in MODELS.items():
        bench = Counted(shape)
        counted[model] = {
            name: bench.memory(TrainConfig(**settings), float8)
            for name, (settings, float8) in SETTINGS.items()
        }
    print("GiB\n| model | | frozen | trained | kept, each picture | with checkpointing |")
    print("|---|---|---|---|---|---|")
    for model, rows in counted.items():
        for name, m in rows.items():
            cells = (m.frozen, m.trained, m.kept[1], m.kept_checkpointed[1])
            print(f"| {model} | {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    print(f"\npictures at once, without / with checkpointing, {ASIDE_GIB} GiB aside")
    print(
        f"| model | | {' | '.join(f'{card} GB' for card in CARDS_GIB)} |\n|---|---|---|---|---|---|"
    )
    for model, rows in counted.items():
        for name, m in rows.items():
            fits = [f"{m.fits(card, False)} / {m.fits(card, True)}" for card in CARDS_GIB]
            print(f"| {model} | {name} | {' | '.join(fits)} |")
    results = {
        f"{m}, {n}": vars(memory) for m, rows in counted.items() for n, memory in rows.items()
    }
    base = counted["SD 1.5, 512 px"]["custom diffusion"]
    for checkpointing in (False, True):
        print(
            f"SD 1.5, 8 pictures, checkpointing {checkpointing}: {base.all(8, checkpointing):.2f}"
        )
    if given.measured:
        for pictures, checkpointing in ((2, False), (8, False), (8, True)):
            found = base.frozen + measured(pictures, checkpointing, given.threads)
            expected = base.all(pictures, checkpointing)
            name = f"SD 1.5, {pictures} pictures, checkpointing {checkpointing}"
            results[name] = {"measured": found, "counted": expected}
            print(f"{name}: measured {found:.2f}, counted {expected:.2f}: {found / expected:.2f}")
    if given.json:
        write_json(given.json, json.loads(json.dumps(results)))


if __name__ == "__main__":
    main()
