"""Attention in bfloat16 on a CPU, against softmax and products in float64 and PyTorch's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from custom_diffusion.trainer.economy import cpu_attention
from custom_diffusion.trainer.economy.cpu_attention import CpuAttention
from torch import Tensor

TOKENS, WIDTH = 600, 40


def drawn(
    spread: float = 1.0, queries: int = TOKENS, keys: int = TOKENS, width: int = WIDTH
) -> list[Tensor]:
    """Queries, keys and values (2, 3, tokens, width), and a gradient; scores vary by `spread`."""
    draw = torch.Generator().manual_seed(0)

    def tensor(tokens: int, scale: float = 1.0) -> Tensor:  # tokens before heads, as UNets do it
        numbers = scale * torch.randn(2, tokens, 3, width, generator=draw)
        return numbers.bfloat16().transpose(1, 2)

    root = math.sqrt(spread)
    return [tensor(queries, root), tensor(keys, root), tensor(keys), tensor(queries)]


def result_and_gradients(
    attention: Callable[..., Tensor], given: list[Tensor], dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    q, k, v = (tensor.detach().to(dtype).requires_grad_() for tensor in given[:3])
    out = attention(q, k, v)
    out.backward(given[3].to(dtype))
    return [out.detach(), *(leaf.grad for leaf in (q, k, v) if leaf.grad is not None)]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [
        float((one.double() - other).norm() / other.norm())
        for one, other in zip(found, wanted, strict=True)
    ]


def ours(*given: Tensor, **options: Any) -> Tensor:
    with CpuAttention():
        return F.scaled_dot_product_attention(*given, **options)


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0, 100.0])
def test_flat_and_peaked_scores(spread: float) -> None:
    """With a spread of 10, scores that are rounded as they are would be 2 to 4 % away."""
    given = drawn(spread)
    wanted = result_and_gradients(exact, given, torch.float64)
    found = result_and_gradients(ours, given)
    assert not torch.equal(found[0], F.scaled_dot_product_attention(*given[:3]))
    assert max(errors(found, wanted)) < 0.015
    assert errors(found, wanted)[0] < 0.005


@pytest.mark.parametrize("scores", [1, 599, 600, 1234, 10**7])
def test_any_size_of_the_blocks(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    given = drawn(queries=70)
    wanted = result_and_gradients(exact, given, torch.float64)
    monkeypatch.setattr(cpu_attention, "_SCORES", scores)
    assert max(errors(result_and_gradients(ours, given), wanted)) < 0.01


@pytest.mark.parametrize("width", [8, 64, 160])
def test_other_widths_and_numbers_of_keys(width: int) -> None:
    given = drawn(queries=33, keys=777, width=width)
    wanted = result_and_gradients(exact, given, torch.float64)
    assert max(errors(result_and_gradients(ours, given), wanted)) < 0.01


def test_scores_of_thousands_stay_finite() -> None:
    given = drawn(spread=3000)
    assert all(tensor.isfinite().all() for tensor in result_and_gradients(ours, given))


def test_only_what_learns_gets_a_gradient() -> None:
    q, k, v, gradient = drawn()
    v.requires_grad_()
    ours(q, k, v).backward(gradient)
    assert q.grad is None
    assert k.grad is None
    assert v.grad is not None
    with torch.no_grad():
        assert not ours(q, k, v).requires_grad


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({}, {"attn_mask": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()}),
        ({}, {"is_causal": True}),
        ({}, {"scale": 0.3}),
        ({"keys": 77}, {}),
        ({"dtype": torch.float32}, {}),
        ({"heads": 0}, {}),
        ({"values": 8}, {}),
    ],
)
def test_what_is_left_to_pytorch(change: dict[str, Any], options: dict[str, Any]) -> None:
    q, k, v, _ = drawn(keys=change.get("keys", TOKENS))
    given = [t.to(change.get("dtype", torch.bfloat16)) for t in (q, k, v)]
    if "heads" in change:
        given = [t[:, 0] for t in given]
    given[2] = given[2][..., : change.get("values")]
    wanted = F.scaled_dot_product_attention(*given, **options)
    assert torch.equal(ours(*given, **options), wanted)


def test_given_by_name() -> None:
    q, k, v, _ = drawn()
    with CpuAttention():
        found = F.scaled_dot_product_attention(query=q, key=k, value=v, scale=None)
    assert torch.equal(found, ours(q, k, v))


def test_other_threads_and_later_calls_are_left_alone() -> None:
    q, k, v, _ = drawn()
    wanted = F.scaled_dot_product_attention(q, k, v)
    found = []
    with CpuAttention():
        other = Thread(target=lambda: found.append(F.scaled_dot_product_attention(q, k, v)))
        other.start()
        other.join()
    found.append(F.scaled_dot_product_attention(q, k, v))
    assert all(torch.equal(one, wanted) for one in found)
