"""What a training step keeps in memory, counted: no GPU is needed, and nothing is computed.

Models are built on torch's meta device, where tensors have shapes and no contents. Counted are the
frozen weights, what is trained with its gradients and Adam's two means, and what autograd keeps of
one forward pass. With checkpointing that is the blocks' inputs and the inside of the largest block.
Not counted: the scratch space of single operations, CUDA's own (about half a GB), the autoencoder,
and the copy of the model that ComfyUI keeps for sampling.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import _pack  # noqa: F401  (puts the pack on the path)
import torch
import torch.nn.functional as F
from _measure import options
from custom_diffusion.host.diffusers import DiffusersDenoiser
from custom_diffusion.trainer.backward import checkpointed
from custom_diffusion.trainer.frozen_layers import keeping_less
from custom_diffusion.trainer.projections import (
    DenseProjections,
    KeyValueProjections,
    LowRankProjections,
)
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

RANK = 16
FROZEN = torch.bfloat16
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A model of true shape and the size it is trained at."""

    latent_edge: int
    text_weights: float
    """Parameters of its text encoders; they stay float32 and are not built here"""
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


@dataclass(frozen=True)
class Memory:
    """Bytes, the last two for one picture at a time."""

    model: str
    method: str
    frozen: float
    trained: float
    kept: float
    kept_checkpointed: float


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


@contextmanager
def counted(denoiser: DiffusersDenoiser, projections: KeyValueProjections) -> Iterator[Kept]:
    kept = Kept([*denoiser.network.parameters(), *_tensors(projections)])
    with (
        mock.patch.object(F, "scaled_dot_product_attention", _fused_attention),
        torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor),
    ):
        yield kept


def measure(name: str, shape: Shape) -> Iterator[Memory]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(FROZEN)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**shape.unet).eval().requires_grad_(False)
    torch.set_default_dtype(before)
    denoiser = DiffusersDenoiser(unet, DDPMScheduler(), vae=None)
    frozen = sum(p.nbytes for p in unet.parameters()) + 4 * shape.text_weights
    methods: dict[str, Callable[[], KeyValueProjections]] = {
        "custom diffusion": lambda: DenseProjections(denoiser, {}),
        f"low-rank {RANK}": lambda: LowRankProjections(denoiser, {}, RANK, seed=0),
    }
    for method, make in methods.items():
        projections = make()
        learnt = 4 * sum(p.nbytes for p in projections.parameters())
        trained = learnt + sum(t.nbytes for t in _tensors(projections) if not t.requires_grad)
        inside = _inside_of_blocks(denoiser, projections, shape)
        yield Memory(
            name,
            method,
            frozen,
            trained,
            _kept(denoiser, projections, shape, checkpointing=False),
            _kept(denoiser, projections, shape, checkpointing=True) + max(inside),
        )


def _kept(
    denoiser: DiffusersDenoiser, projections: KeyValueProjections, shape: Shape, checkpointing: bool
) -> int:
    blocks = checkpointed(denoiser.network, denoiser.blocks) if checkpointing else nullcontext()
    with blocks, counted(denoiser, projections) as kept:
        _predict(denoiser, projections, shape)
    return kept.bytes


def _inside_of_blocks(
    denoiser: DiffusersDenoiser, projections: KeyValueProjections, shape: Shape
) -> list[int]:
    """What each block keeps, when nothing is checkpointed."""
    before: dict[Any, int] = {}
    sizes: list[int] = []
    with counted(denoiser, projections) as kept:
        hooks = []
        for path in denoiser.blocks:
            block = denoiser.network.get_submodule(path)
            hooks += [
                block.register_forward_pre_hook(lambda b, _: before.update({b: kept.bytes})),
                block.register_forward_hook(lambda b, *_: sizes.append(kept.bytes - before[b])),
            ]
        _predict(denoiser, projections, shape)
    for hook in hooks:
        hook.remove()
    return sizes


def _predict(denoiser: DiffusersDenoiser, projections: KeyValueProjections, shape: Shape) -> None:
    """One picture, with a context that learns: the graph stays until the counting is over."""
    latents = torch.empty(1, 4, shape.latent_edge, shape.latent_edge, device="meta")
    timesteps = torch.empty(1, dtype=torch.long, device="meta")
    family = denoiser.family
    context = torch.empty(1, 77, family.context_width, device="meta", requires_grad=True)
    pooled = torch.empty(1, family.pooled_width, device="meta", requires_grad=True)
    sizes = torch.empty(1, 6, dtype=torch.long, device="meta")
    with projections.installed(), keeping_less(denoiser.network):
        projections.predict(latents, timesteps, context, pooled, sizes)


def _tensors(projections: KeyValueProjections) -> list[Tensor]:
    return [value for value in vars(projections).values() if isinstance(value, Tensor)]


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Attention as a GPU computes it, without the square of positions in memory."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value)[0]  # type: ignore[no-any-return]


def main() -> None:
    given = options(__doc__ or "", threads=1, rounds=1).parse_args()
    rows = [row for name, shape in MODELS.items() for row in measure(name, shape)]
    print("| model | method | frozen | trained | kept | all | kept | all |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        fixed = row.frozen + row.trained
        cells = (row.frozen, row.trained, row.kept, fixed + row.kept)
        cells += (row.kept_checkpointed, fixed + row.kept_checkpointed)
        print(f"| {row.model} | {row.method} | {' | '.join(f'{c / GB:.2f}' for c in cells)} |")
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
