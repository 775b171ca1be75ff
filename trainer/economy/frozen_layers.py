"""Frozen layers that keep less for the backward pass.

PyTorch keeps the input of a convolution for the gradient of its weight, even where the weight has
none; and both the result of a norm and that of the SiLU behind it, though the norm's input, kept
anyway, gives them again at the cost of a few operations an element. A network that only hands
gradients on needs a third less memory without. No convolution and no product is computed twice.

Weights may lie in a smaller type than they compute in (float8, say). Their casts are made for each
use and not kept either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

_NORMED_FROM = "custom_diffusion_normed_from"


@contextmanager
def keeping_less(network: nn.Module) -> Iterator[None]:
    """While the context lasts, a frozen network keeps what its gradients need and no more.

    Predictions and gradients stay the same. A network with weights that learn is left alone: it
    may compute with casts, which would have to be repeated.
    """
    with ExitStack() as stack:
        if not any(parameter.requires_grad for parameter in network.parameters()):
            for module in network.modules():
                if forward := _forward_of(module):
                    stack.enter_context(replaced_forward(module, forward))
        yield


@contextmanager
def channels_last(network: nn.Module) -> Iterator[None]:
    """While the context lasts, the weights of convolutions lie as kernels of half precision read
    them, and so do the pictures that come out: channels side by side.
    """
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        yield
    finally:
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While the context lasts, the module computes this."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:  # as in most modules: it is that of the class
            del module.forward
        else:
            module.forward = own


def _forward_of(module: nn.Module) -> Callable[..., Tensor] | None:
    if isinstance(module, nn.Conv2d):
        numbers = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return partial(_convolution, module) if numbers else None
    if isinstance(module, nn.Linear):  # of other types torch keeps no more than the weight, too
        return partial(_linear, module) if module.weight.dtype.itemsize == 1 else None
    if isinstance(module, nn.GroupNorm):
        return partial(_group_norm, module)
    if isinstance(module, nn.SiLU):
        return None if module.inplace else _silu
    # Both hosts name it so: a linear layer `proj`, half of it gated by GELU of the other half.
    if type(module).__name__ == "GEGLU":
        return partial(_gated_gelu, module)
    return None


def _linear(layer: nn.Linear, values: Tensor) -> Tensor:
    apply: Callable[..., Tensor] = _Linear.apply
    return apply(values, layer.weight, layer.bias)


def _convolution(layer: nn.Conv2d, images_bchw: Tensor) -> Tensor:
    numbers = (layer.stride, layer.padding, layer.dilation, layer.groups)
    apply: Callable[..., Tensor] = _Convolution.apply
    return apply(images_bchw, layer.weight, layer.bias, *numbers)


def _group_norm(layer: nn.GroupNorm, images_bchw: Tensor) -> Tensor:
    normed = F.group_norm(images_bchw, layer.num_groups, layer.weight, layer.bias, layer.eps)
    setattr(normed, _NORMED_FROM, (layer, images_bchw))
    return normed


def _silu(values: Tensor) -> Tensor:
    normed_from = getattr(values, _NORMED_FROM, None)
    if normed_from is None:
        return F.silu(values)
    layer, before = normed_from
    apply: Callable[..., Tensor] = _NormedSilu.apply
    return apply(values, before.detach(), layer.num_groups, layer.weight, layer.bias, layer.eps)


def _gated_gelu(layer: Any, hidden: Tensor) -> Tensor:
    apply: Callable[..., Tensor] = _GatedGelu.apply
    return apply(layer.proj(hidden))


class _Linear(torch.autograd.Function):
    """Keeps the weight alone, and not its cast."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(values, weight.to(values.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None, None


class _Convolution(torch.autograd.Function):
    """Keeps the weight alone."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, *numbers: Any
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.numbers = images.shape, numbers
        return F.conv2d(images, weight.to(images.dtype), bias, *numbers)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        weight = weight.to(gradient.dtype)
        of_input = conv2d_input(ctx.shape, weight, gradient, *ctx.numbers)
        return of_input, *[None] * (2 + len(ctx.numbers))


class _NormedSilu(torch.autograd.Function):
    """SiLU of a group norm's result, which is made again from the norm's input."""

    @staticmethod
    def forward(ctx: Any, normed: Tensor, before: Tensor, groups: int, *affine: Any) -> Tensor:
        weight, bias, ctx.eps = affine
        ctx.save_for_backward(before, weight, bias)
        ctx.groups = groups
        return F.silu(normed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        before, weight, bias = ctx.saved_tensors
        normed = F.group_norm(before, ctx.groups, weight, bias, ctx.eps)
        return torch.ops.aten.silu_backward(gradient, normed), None, None, None, None, None


class _GatedGelu(torch.autograd.Function):
    """Half of the numbers times GELU of the other half (Shazeer 2020); keeps both, not the GELU."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        hidden, gate = both.chunk(2, -1)
        return hidden * F.gelu(gate)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (both,) = ctx.saved_tensors
        hidden, gate = both.chunk(2, -1)
        of_both = torch.empty_like(both)  # and nothing beside it: here a step's memory is highest
        of_hidden, of_gate = of_both.chunk(2, -1)
        torch.ops.aten.gelu.out(gate, out=of_hidden).mul_(gradient)
        torch.mul(gradient, hidden, out=of_gate)
        torch.ops.aten.gelu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return of_both
