"""Attention in bfloat16 on a CPU, as fast as its matrix products.

PyTorch's own keeps scores in float32 on the way. On a CPU that multiplies in bfloat16 it takes as
long as in float32: half of a training step at 512 px. Here scores are bfloat16. Eight bits say
little about a score of 20, and the highest scores are those that count. So a row's highest is found
first, and its distance from the others comes out of a second product, which adds up in float32 and
rounds once. What is rounded most is what counts least, and the result is as exact as PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .frozen_layers import replaced_forward

_KEYS_FROM = 512  # measured: with fewer, PyTorch's own is as fast
_SCORES = 2**21  # at a time: they stay in a CPU's cache
_LOG2_E = math.log2(math.e)


@contextmanager
def cpu_attention(network: nn.Module) -> Iterator[None]:
    """While the context lasts, the network's attention in bfloat16 on a CPU is computed here.

    Other types and devices, masks and short sequences of keys are left to PyTorch. Speed and errors
    beside its own are in docs/performance.md.
    """
    with ExitStack() as stack:
        for module in network.modules():
            # Both hosts name it so. Each layer by itself: checkpointing computes some once more.
            if hasattr(module, "to_q"):
                forward = partial(_with_ours, module.forward)
                stack.enter_context(replaced_forward(module, forward))
        yield


def _with_ours(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with CpuAttention():
        return forward(*args, **kwargs)


class CpuAttention(TorchFunctionMode):
    """While the context lasts, what this thread asks PyTorch's attention for may be computed here.

    Not in a backward pass that begins in it: PyTorch suspends such contexts meanwhile.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            func = _ours_or_pytorchs
        return func(*args, **(kwargs or {}))


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(QK'/sqrt(d)) V for (batch, heads, tokens, d) in bfloat16, with its gradients."""
    return _Attention.apply(queries, keys, values)  # type: ignore[no-any-return,no-untyped-call]


def _ours_or_pytorchs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **others: Any,
) -> Tensor:
    plain = attn_mask is None and not (dropout_p or is_causal or any(others.values()))
    alike = query.ndim == 4 and query.shape[:2] == key.shape[:2] and key.shape == value.shape
    here = query.dtype == torch.bfloat16 and query.device.type == "cpu"
    if plain and alike and here and key.shape[-2] >= _KEYS_FROM:
        return attention(query, key, value)
    given = (query, key, value, attn_mask, dropout_p, is_causal)
    return F.scaled_dot_product_attention(*given, **others)


class _Attention(torch.autograd.Function):
    """Keeps each row's highest score and sum, not the weights (as Dao et al. 2022 do)."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        scale = queries.shape[-1] ** -0.5 * _LOG2_E
        out = torch.empty_like(queries)
        highest, sums = (queries.new_empty(*queries.shape[:-1], 1) for _ in range(2))
        for q, k, v, o, high, total in _heads(queries, keys, values, out, highest, sums):
            v_one = torch.cat([v, torch.ones_like(v[:, :1])], -1)  # its product: sums of weights
            for q_, o_, high_, total_ in _blocks(len(k), q, o, high, total):
                scores = torch.addmm(high_, q_, k.T, beta=0, alpha=scale)
                torch.amax(scores, -1, keepdim=True, out=high_)
                weights = torch.addmm(high_, q_, k.T, beta=-1, alpha=scale, out=scores).exp2_()
                summed = weights @ v_one
                total_.copy_(summed[:, -1:])
                torch.div(summed[:, :-1], total_, out=o_)
        ctx.save_for_backward(queries, keys, values, highest, sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept = ctx.saved_tensors  # asked for once: checkpointing computes them for it
        scale = kept[0].shape[-1] ** -0.5
        found = [torch.empty_like(tensor) for tensor in kept[:3]]
        for q, k, v, high, total, g, of_q, of_k, of_v in _heads(*kept, gradient, *found):
            sum_k, sum_v = (torch.zeros(k.shape[::-1], dtype=torch.float32) for _ in range(2))
            for q_, high_, total_, g_, of_q_ in _blocks(len(k), q, high, total, g, of_q):
                scores = torch.addmm(high_, q_, k.T, beta=-1, alpha=scale * _LOG2_E)
                weights = scores.exp2_().div_(total_)
                of_scores = torch._softmax_backward_data(g_ @ v.T, weights, -1, weights.dtype)
                torch.addmm(of_q_, of_scores, k, beta=0, alpha=scale, out=of_q_)
                sum_k += q_.T @ of_scores
                sum_v += g_.T @ weights
            of_k.copy_(scale * sum_k.T)
            of_v.copy_(sum_v.T)
        return found[0], found[1], found[2]


def _heads(*tensors_bhnd: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each head of each picture by itself: its scores are all that is there at a time."""
    for of_picture in zip(*tensors_bhnd, strict=True):
        yield from zip(*of_picture, strict=True)


def _blocks(keys: int, *of_queries: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(max(1, _SCORES // keys)) for tensor in of_queries), strict=True)
