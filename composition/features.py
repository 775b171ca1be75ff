"""Text features that know which of their rows are whose words.

Between the encoding of a prompt and the sampler others may work on its features: two prompts are
concatenated, averaged, cut, moved. Where the rows are afterwards is a matter of what was done. So
each concept's rows go along as a companion of the same shape, m ⊙ c, and whatever is linear is done
to the companions too: a weighted mean of two prompts has the weighted mean of what each adds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("custom_diffusion")

_OF_ONE = frozenset(
    "getitem narrow select index_select split split_with_sizes tensor_split chunk unbind repeat "
    "tile repeat_interleave expand expand_as to cpu cuda float half bfloat16 double type clone "
    "detach contiguous unsqueeze squeeze view reshape flatten unflatten transpose permute movedim "
    "flip roll neg zeros_like requires_grad pin_memory share_memory "
    "div divide truediv idiv itruediv".split()
)
"""Linear in their first argument"""
_PRODUCTS = frozenset("mul multiply rmul imul".split())
"""Linear in the argument that has marks, if it is one alone"""
_SUMS: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys("cat concat concatenate stack hstack vstack".split(), (0,)),
    **dict.fromkeys("add radd iadd sub subtract rsub isub lerp".split(), (0, 1)),
    "where": (1, 2),
    "setitem": (0, 2),
}
"""Linear in these arguments together; what has no marks there adds nothing to a companion"""
_SUMMAND_NAMES = frozenset(("tensors", "input", "other", "end"))
_READ_ONLY = frozenset("to type_as expand_as view_as reshape_as".split())
"""Read the type or shape alone of a tensor that is not their first argument"""
_NETWORK = frozenset(("linear",))
"""What a network that knows no routes does with features: their end, and nothing to warn of"""


class MarkedFeatures(Tensor):
    """Features (b, n, d) of prompts with the rows of every concept; else an ordinary tensor."""

    own: Mapping[str, Tensor]
    """Concept → its rows where they stand, zero elsewhere; of the features' shape"""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        name = func.__name__.strip("_")
        linear = _is_linear(name, args, named)
        keys = dict.fromkeys(key for features in _marked(args, named) for key in features.own)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **named)
            target = args[0] if name == "setitem" else result
            if not linear:
                return _unmarked(name, args, result)
            companions = {}
            for key in keys:
                own_args, own_named = _of_concept(key, name, args, named)
                companion = func(*own_args, **own_named)
                companions[key] = own_args[0] if name == "setitem" else companion
        if isinstance(target, (list, tuple)):
            own = [{key: c[i] for key, c in companions.items()} for i in range(len(target))]
            return type(result)(mark(part, o) for part, o in zip(target, own, strict=True))
        marked = mark(target, companions)
        return None if name == "setitem" else marked

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What is written to a file is an ordinary tensor, which needs no pack to be read."""
        return plain(self).__reduce_ex__(protocol)


def mark(features: Tensor, own: Mapping[str, Tensor]) -> MarkedFeatures:
    """The same memory with these marks; marked features get them in place of those they have."""
    with torch._C.DisableTorchFunctionSubclass():
        if not isinstance(features, MarkedFeatures):
            features = features.as_subclass(MarkedFeatures)
    features.own = own
    return features


def marks_of(features: Tensor) -> Mapping[str, Tensor]:
    return features.own if isinstance(features, MarkedFeatures) else {}


def plain(features: Tensor) -> Tensor:
    """The same memory without marks."""
    with torch._C.DisableTorchFunctionSubclass():
        return features.as_subclass(Tensor)


def _is_linear(name: str, args: Sequence[Any], named: Mapping[str, Any]) -> bool:
    marked = list(_marked(args, named))
    if "out" in named or not args and not named:
        return False
    if name == "setitem":
        return isinstance(args[0], MarkedFeatures)
    if name in _SUMS:
        return True
    if name in _OF_ONE:
        return len(marked) == 1 and bool(args) and args[0] is marked[0]
    return name in _PRODUCTS and len(marked) == 1


def _marked(args: Sequence[Any], named: Mapping[str, Any]) -> Iterator[MarkedFeatures]:
    for value in (*args, *named.values()):
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, MarkedFeatures):
                yield one


def _of_concept(
    key: str, name: str, args: Sequence[Any], named: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments with the companions of one concept in place of features."""
    summands = _SUMS.get(name, ())

    def companion(value: Any, summand: bool) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(companion(one, summand) for one in value)
        if isinstance(value, MarkedFeatures):
            own = value.own.get(key)
            return torch.zeros_like(plain(value)) if own is None else own
        if summand and isinstance(value, Tensor):
            return torch.zeros_like(value)
        return 0 if summand and isinstance(value, (int, float)) else value

    return (
        [companion(value, place in summands) for place, value in enumerate(args)],
        {
            word: companion(value, bool(summands) and word in _SUMMAND_NAMES)
            for word, value in named.items()
        },
    )


def _unmarked(name: str, args: Sequence[Any], result: Any) -> Any:
    """What an operation gives that no companion can follow."""
    if isinstance(result, MarkedFeatures):  # changed in place
        result.own = {}
    elif not isinstance(result, Tensor) or result.ndim < 2 or not result.is_floating_point():
        return result
    reads = name in _READ_ONLY and bool(args) and not isinstance(args[0], MarkedFeatures)
    if not reads and name not in _NETWORK:
        _warn(name)
    return plain(result)


@cache
def _warn(name: str) -> None:
    log.warning(
        "The text features went through %r, after which nobody knows where the words of concepts "
        "are: prompts that it is done to are drawn without the concepts that are routed.",
        name,
    )
