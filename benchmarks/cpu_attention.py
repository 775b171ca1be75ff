"""Attention in bfloat16 on a CPU beside PyTorch's own: its time, and how far each is from exact.

Shapes are those of self-attention in SD 1.5 for two pictures. Both get the same queries, keys and
values, once with scores that vary little and once with scores that vary much; exact is softmax and
products in float64.
"""

import math
from collections.abc import Callable
from functools import partial

import _pack  # noqa: F401  (puts the pack on the path)
import torch
import torch.nn.functional as F
from _measure import interleaved, options, write_json
from custom_diffusion.trainer.economy.cpu_attention import attention
from torch import Tensor

SHAPES = {"512 px": (4096, 40), "512 px, second level": (1024, 80), "256 px": (1024, 40)}
"""Tokens and the width of a head; the pictures have eight heads"""
HEADS, PICTURES = 8, 2
SPREADS = (1.0, 10.0, 30.0)
"""Standard deviations of the scores"""
BOTH: dict[str, Callable[..., Tensor]] = {
    "pytorch": F.scaled_dot_product_attention,
    "ours": attention,
}


def drawn(tokens: int, width: int, spread: float = 1.0, pictures: int = PICTURES) -> list[Tensor]:
    """Queries, keys, values and the gradient of what comes out."""

    def tensor(scale: float) -> Tensor:  # tokens before heads, as UNets lay them out
        numbers = scale * torch.randn(pictures, tokens, HEADS, width)
        return numbers.bfloat16().transpose(1, 2)

    return [tensor(scale) for scale in (math.sqrt(spread), math.sqrt(spread), 1.0, 1.0)]


def both_ways(attend: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    """What comes out, and the gradients of queries, keys and values."""
    leaves = [tensor.detach().requires_grad_() for tensor in given[:3]]
    out = attend(*leaves)
    out.backward(given[3])
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def main() -> None:
    given = options(__doc__ or "", threads=2, rounds=7).parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    results: dict[str, float] = {}
    for name, shape in SHAPES.items():
        tensors = drawn(*shape)
        with torch.no_grad():
            forward = interleaved(
                {side: partial(attend, *tensors[:3]) for side, attend in BOTH.items()}, given.rounds
            )
        whole = interleaved(
            {side: partial(both_ways, attend, tensors) for side, attend in BOTH.items()},
            given.rounds,
        )
        for part, times in (("forward", forward), ("forward and backward", whole)):
            row = {side: 1e3 * times.median(side) for side in BOTH}
            row["ratio"] = times.ratio("pytorch", "ours")
            results |= {f"{name}, {part}, {key}": value for key, value in row.items()}
            print(
                f"{name}, {shape[0]} tokens, {part}: PyTorch {row['pytorch']:.0f} ms, "
                f"ours {row['ours']:.0f} ms, {row['ratio']:.2f} times as fast"
            )
    for spread in SPREADS:
        tensors = drawn(*SHAPES["512 px"], spread=spread, pictures=1)
        wanted = both_ways(exact, [tensor.double() for tensor in tensors])
        for side, attend in BOTH.items():
            errors = [
                float((found - true).norm() / true.norm())
                for found, true in zip(both_ways(attend, tensors), wanted, strict=True)
            ]
            results[f"scores of {spread:g}, {side}, error"] = errors[0]
            results[f"scores of {spread:g}, {side}, error of gradients"] = max(errors[1:])
            print(
                f"scores vary by {spread:g}, {side}: error {errors[0]:.2%}, of gradients at most "
                f"{max(errors[1:]):.2%}"
            )
    write_json(given.json, results)


if __name__ == "__main__":
    main()
