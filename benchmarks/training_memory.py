"""What a training step holds in memory, counted, and what of it fits on a GPU.

Models are built on torch's meta device, where tensors have shapes and no contents, so that no GPU
is needed and nothing is computed. Counted are the frozen weights, what is trained with Adam's two
means, what autograd keeps of the text encoders, and every tensor that lives while the UNet goes
forward and backward, when they are most. Not counted: what a kernel takes inside itself, CUDA's
own memory, the autoencoder, and the model that ComfyUI keeps for sampling.

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
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import _pack  # noqa: F401  (puts the pack on the path)
import torch
import torch.nn.functional as F
from _measure import options, write_json
from _models import random_vae, text_config
from custom_diffusion.host.clip.text_encoder import ClipTextEncoder
from custom_diffusion.host.diffusers.denoiser import DiffusersDenoiser
from custom_diffusion.host.open_clip.vocabulary import clip_tokenizer
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.economy.backward import recomputed
from custom_diffusion.trainer.economy.frozen_layers import keeping_less
from custom_diffusion.trainer.learning.projections import KeyValueProjections
from custom_diffusion.trainer.learning.prompt_features import PromptFeatures
from custom_diffusion.trainer.methods import METHODS
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_step import CAPTIONS as WORDED
from training_step import Bench
from transformers import CLIPTextModel

FROZEN = torch.bfloat16
GIB = 2**30
CARDS_GIB = (6, 8, 12, 24)
ASIDE_GIB = 1.0
"""For CUDA and for the scratch space of single operations."""
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""With these glibc returns what is freed, and resident memory is what is in use."""
STATE_BYTES = {"adamw": 8, "adamw 8-bit": 2}
"""Of Adam's two means, for each number that learns."""


CAPTIONS = 4
"""With the word, in a step of eight pictures: half of them are of the class."""
LONGEST_CAPTION = max(WORDED, key=len)
MANY = 64
"""Pictures at once, up to which memory is taken to grow in a line: it grows at most so."""


@dataclass(frozen=True)
class Shape:
    """A model of true shape and the size it is trained at."""

    latent_edge: int
    text: Sequence[tuple[int, int]]
    """Width and layers of its text encoders"""
    unet: dict[str, Any]


_WIDE = {"use_linear_projection": True}
MODELS = {
    "SD 1.5, 512 px": Shape(64, [(768, 12)], {"cross_attention_dim": 768, "attention_head_dim": 8}),
    "SD 2.1, 768 px": Shape(
        96,
        [(1024, 23)],
        {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), **_WIDE},
    ),
    "SDXL, 1024 px": Shape(
        128,
        [(768, 12), (1280, 32)],
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
    """GiB. What a step holds grows with the pictures that are computed at once."""

    unet: float
    text: float
    """Weights of the text encoders"""
    trained: float
    """With Adam's means; gradients are part of a step"""
    caption: float
    """What autograd keeps of the text encoders, for each that holds the word"""
    step: tuple[float, float]
    """One picture, and each further one."""
    step_checkpointed: tuple[float, float]

    def all(self, pictures: int, checkpointing: bool = False, captions: int = CAPTIONS) -> float:
        first, further = self.step_checkpointed if checkpointing else self.step
        standing = self.unet + self.text + self.trained + captions * self.caption
        return standing + first + (pictures - 1) * further

    def fits(self, card_gib: float, checkpointing: bool) -> int:
        """How many pictures at once."""
        _, further = self.step_checkpointed if checkpointing else self.step
        left = card_gib - ASIDE_GIB - self.all(1, checkpointing)
        return 0 if left < 0 else 1 + int(left / further)


class Living(TorchDispatchMode):
    """Bytes of all tensors that are made while this lasts and still live, and the most so far."""

    def __init__(self, already: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = self.most_bytes = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in already)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(storage)
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return result

    def _change(self, count: int) -> None:
        self.bytes += count
        self.most_bytes = max(self.most_bytes, self.bytes)


class Counted:
    """A model on the meta device, and what a step on it holds."""

    def __init__(self, shape: Shape) -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(FROZEN)
        with torch.device("meta"):
            unet = UNet2DConditionModel(**shape.unet).eval().requires_grad_(False)
        torch.set_default_dtype(before)
        self._shape = shape
        self._denoiser = DiffusersDenoiser(unet, DDPMScheduler(), random_vae())

    def memory(self, config: TrainConfig, float8: bool) -> Memory:
        projections = METHODS[config.method].projections(self._denoiser, {}, config)
        unet = sum(
            weight.numel() if float8 and weight.ndim > 1 else weight.nbytes
            for weight in self._denoiser.network.parameters()
        )
        numbers = sum(parameter.numel() for parameter in projections.parameters())
        trained = numbers * (4 + STATE_BYTES[config.optimizer])
        trained += sum(t.nbytes for t in _tensors(projections) if not t.requires_grad)
        text = [] if config.text_encoder_on_cpu else [_text(*each) for each in self._shape.text]
        return Memory(
            unet / GIB,
            sum(weights for weights, _ in text) / GIB,
            trained / GIB,
            sum(kept for _, kept in text) / GIB,
            self._one_and_further(projections, ()),
            self._one_and_further(projections, self._denoiser.blocks),
        )

    def _one_and_further(
        self, projections: KeyValueProjections, blocks: Sequence[str]
    ) -> tuple[float, float]:
        one, many = (self._most(projections, n, blocks) / GIB for n in (1, MANY))
        return one, (many - one) / (MANY - 1)

    def _most(self, projections: KeyValueProjections, pictures: int, blocks: Sequence[str]) -> int:
        edge, family = self._shape.latent_edge, self._denoiser.family
        with torch.device("meta"):
            latents = torch.empty(pictures, 4, edge, edge)
            timesteps = torch.empty(pictures, dtype=torch.long)
            context = torch.empty(pictures, 77, family.context_width, requires_grad=True)
            pooled = torch.empty(pictures, family.pooled_width, requires_grad=True)
            sizes = torch.empty(pictures, 6, dtype=torch.long)
        network = self._denoiser.network
        with (
            mock.patch.object(F, "scaled_dot_product_attention", _fused_attention),
            projections.installed(),
            keeping_less(network),
            recomputed(network, blocks),
            Living([*network.parameters(), *_tensors(projections)]) as living,
        ):
            for _ in range(2):  # parts of a batch: the second meets the gradients of the first
                projections.predict(latents, timesteps, context, pooled, sizes).mean().backward()
        for parameter in projections.parameters():
            parameter.grad = None
        return living.most_bytes


def _text(width: int, layers: int) -> tuple[int, int]:
    """Bytes of a text encoder's weights, and of what autograd keeps for each caption."""
    with torch.device("meta"):
        model = CLIPTextModel(text_config(width, layers)).eval().requires_grad_(False)
        word = {"clip": {"<new1>": nn.Parameter(torch.empty(1, width))}}
        encoder = ClipTextEncoder(
            "clip", model, clip_tokenizer(), pad_id=0, embeddings=word["clip"]
        )
        encoder.to(torch.device("meta"), FROZEN)
        prompts = PromptFeatures(encoder, word, TrainConfig().gradient_cut)
        weights = list(model.parameters())
        with (
            mock.patch.object(F, "scaled_dot_product_attention", _fused_attention),
            Living(weights) as living,
        ):
            features = prompts.encode([LONGEST_CAPTION])
            kept = living.bytes
            del features
    return sum(weight.nbytes for weight in weights), kept


def _tensors(projections: KeyValueProjections) -> list[Tensor]:
    return [value for value in vars(projections).values() if isinstance(value, Tensor)]


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Attention as a GPU computes it, without the square of positions in memory."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value)[0]  # type: ignore[no-any-return]


def grown_gib(pictures: int, checkpointing: bool) -> float:
    """What the resident memory of this process grows by in two steps of SD 1.5 at 512 px."""
    bench = Bench(FROZEN, MODELS["SD 1.5, 512 px"].latent_edge, pictures)
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
    print("GiB\n| model | | UNet | text | trained | a caption | a picture | checkpointed |")
    print("|---|---|---|---|---|---|---|---|")
    for model, rows in counted.items():
        for name, m in rows.items():
            cells = (m.unet, m.text, m.trained, m.caption, m.step[1], m.step_checkpointed[1])
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
            grown = measured(pictures, checkpointing, given.threads)
            found = base.unet + base.text + grown
            expected = base.all(pictures, checkpointing, captions=2)  # as `Bench` has them
            name = f"SD 1.5, {pictures} pictures, checkpointing {checkpointing}"
            results[name] = {"measured": found, "counted": expected}
            print(f"{name}: measured {found:.2f}, counted {expected:.2f}: {found / expected:.2f}")
    if given.json:
        write_json(given.json, json.loads(json.dumps(results)))


if __name__ == "__main__":
    main()
