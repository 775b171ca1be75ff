"""Features with marks: whatever is done to them is done to m ⊙ c by hand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from custom_diffusion.composition.features import MarkedFeatures, mark, marks_of, plain
from custom_diffusion.composition.routing import number_rows
from torch import Tensor


def features(seed: int = 0, *rows: int) -> tuple[Tensor, Tensor]:
    """Plain features (1, 6, 4), and the same with all rows but these at zero."""
    c = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(seed))
    m = torch.zeros(1, 6, 1)
    m[:, list(rows)] = 1
    return c, m * c


BESIDE = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(9))
SHARES = torch.rand(1, 6, 1, generator=torch.Generator().manual_seed(8))
ALONE: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    name: (operation, operation)
    for name, operation in {
        "scaled": lambda x: 2 * x * 0.3 / 4,
        "per row": lambda x: x * SHARES + SHARES * x,
        "cut": lambda x: x[:, 1:4],
        "chunk": lambda x: x.chunk(2, dim=1)[1],
        "split": lambda x: torch.split(x, 4, dim=1)[0],
        "repeat": lambda x: x.repeat(2, 1, 1).expand(2, 6, 4),
        "moved": lambda x: x.to(torch.float64).cpu().contiguous().clone().detach(),
        "shape": lambda x: x.unsqueeze(0).squeeze(0).permute(0, 2, 1).transpose(1, 2),
        "negated": lambda x: -x,
        "zero": torch.zeros_like,
        "in place": lambda x: x.clone().mul_(3.0),
        "copied": copy.deepcopy,
    }.items()
} | {
    "appended": (
        lambda x: torch.cat((BESIDE, x), 1),
        lambda x: torch.cat((torch.zeros_like(BESIDE), x), 1),
    ),
    "padded": (
        lambda x: torch.cat([x, *[torch.zeros(1, 2, 4)]], dim=1),
        lambda x: torch.cat([x, torch.zeros(1, 2, 4)], dim=1),
    ),
    "sum": (lambda x: x + BESIDE - 1.0, lambda x: x),
    "difference": (lambda x: BESIDE - x, lambda x: -x),
    "mean": (lambda x: torch.lerp(x, BESIDE, 0.25), lambda x: 0.75 * x),
    "stacked": (
        lambda x: torch.stack([x, BESIDE]),
        lambda x: torch.stack([x, torch.zeros_like(x)]),
    ),
}


@pytest.mark.parametrize(("operation", "by_hand"), ALONE.values(), ids=ALONE)
def test_marks_follow(operation: Callable[[Any], Any], by_hand: Callable[[Any], Any]) -> None:
    c, own = features(0, 2, 3)
    result = operation(mark(c.clone(), {"cat": own.clone()}))
    assert torch.equal(plain(result), operation(c.clone()))
    assert marks_of(result).keys() == {"cat"}
    assert type(marks_of(result)["cat"]) is Tensor
    assert torch.allclose(marks_of(result)["cat"], by_hand(own.clone()).to(plain(result).dtype))


def test_two_prompts_with_other_concepts() -> None:
    (a, cat), (b, dog) = features(0, 2), features(1, 4, 5)
    one, two = mark(a, {"cat": cat}), mark(b, {"dog": dog})
    mean = one * 0.3 + torch.mul(two, 0.7)
    assert torch.allclose(marks_of(mean)["cat"], 0.3 * cat)
    assert torch.allclose(marks_of(mean)["dog"], 0.7 * dog)
    joined = torch.cat([one, two], 1)
    assert torch.equal(marks_of(joined)["dog"], torch.cat([torch.zeros_like(a), dog], 1))


def test_rows_that_are_set() -> None:
    (a, cat), (b, dog) = features(0, 2, 3), features(1, 4)
    one, two = mark(a, {"cat": cat}), mark(b, {"dog": dog})
    one[:, 3:5] = two[:, 3:5]
    cat_after, dog_after = cat.clone(), torch.zeros_like(dog)
    cat_after[:, 3:5], dog_after[:, 4] = 0, dog[:, 4]
    assert torch.equal(marks_of(one)["cat"], cat_after)
    assert torch.equal(marks_of(one)["dog"], dog_after)


@pytest.mark.parametrize("operation", [torch.tanh, lambda x: x * x, lambda x: 1 / x, torch.exp_])
def test_what_is_not_linear_has_no_marks_and_a_warning(
    operation: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    from custom_diffusion.composition import features as module

    module._warn.cache_clear()
    c, own = features(0, 2)
    marked = mark(c.clone(), {"cat": own})
    result = operation(marked)
    assert torch.equal(plain(result), operation(c.clone()))
    assert marks_of(result) == {}
    assert "text features went through" in caplog.text


def test_a_file_holds_an_ordinary_tensor() -> None:
    c, own = features(0, 2)
    loaded = pickle.loads(pickle.dumps(mark(c, {"cat": own})))
    assert type(loaded) is Tensor and torch.equal(loaded, c)


def test_shape_and_type_are_ordinary() -> None:
    c, own = features(0, 2)
    marked = mark(c, {"cat": own})
    assert isinstance(marked, MarkedFeatures) and marked.shape == c.shape
    assert torch.zeros(1).to(marked).dtype == c.dtype
    assert marks_of(torch.ones(1, 6, 4).to(marked)) == {}
    assert bool(torch.any(marked != 0))


def test_rows_are_numbered_over_prompts() -> None:
    (_, cat), (_, dog), (_, both) = features(0, 1, 2), features(1, 2, 5), features(2, 0)
    numbers, (cats, dogs) = number_rows([[cat, dog], [both, torch.zeros_like(both)]])
    assert [n.tolist() for n in numbers] == [[[0, 1, 2, 0, 0, 3]], [[4, 0, 0, 0, 0, 0]]]
    assert torch.equal(cats, torch.cat([cat[0, [1, 2, 5]], both[0, :1]]))
    assert torch.equal(dogs, torch.cat([dog[0, [1, 2, 5]], torch.zeros(1, 4)]))
