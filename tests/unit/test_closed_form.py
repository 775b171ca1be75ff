"""Eq. 4-5 for one matrix, against two solvers of our own in numpy, scipy's optimizer and random
perturbation.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from custom_diffusion.concept.errors import MergeError
from custom_diffusion.merge.closed_form import constrained_least_squares
from scipy.optimize import minimize
from support.concepts import (
    Matrix,
    objective,
    solve_by_elimination,
    solve_by_multipliers,
    spectral_matrix,
)
from torch import Tensor

Problem = tuple[Matrix, Matrix, Matrix, Matrix]

CLIP_CONDITION = 3.5e4
"""About the condition number of real caption features."""


def make_problem(
    out: int = 7,
    width: int = 24,
    captions: int = 120,
    rows: int = 5,
    condition: float = 50.0,
    seed: int = 0,
) -> Problem:
    """W₀, C_reg, C and V; the constraint rows look like caption features."""
    draw = np.random.default_rng(seed)
    weight = draw.standard_normal((out, width))
    c_reg = spectral_matrix(captions, width, condition, seed)
    c = draw.standard_normal((rows, captions)) @ c_reg
    targets = c @ weight.T + 0.1 * draw.standard_normal((rows, out)) * np.linalg.norm(c)
    return weight, c_reg, c, targets


def solve(problem: Problem, dtype: torch.dtype = torch.float64) -> Matrix:
    weight, c_reg, c, targets = (torch.from_numpy(m).to(dtype) for m in problem)
    return constrained_least_squares(weight, c_reg, c, targets).double().numpy()


def relative(a: Matrix, b: Matrix) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


SIZES = [
    {},
    {"rows": 1},
    {"rows": 24},
    {"out": 1},
    {"captions": 24},
    {"condition": 1.0},
    {"condition": 1e4},
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_constraints_hold(size: dict[str, int]) -> None:
    problem = make_problem(**size)
    _, _, c, targets = problem
    assert relative(c @ solve(problem).T, targets) < 1e-9


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_solves_the_system_of_weights_and_multipliers(size: dict[str, int]) -> None:
    problem = make_problem(**size)
    assert relative(solve(problem), solve_by_multipliers(*problem)) < 1e-6
    assert relative(solve(problem), solve_by_elimination(*problem)) < 1e-6


def test_an_optimizer_that_knows_no_formula_finds_the_same() -> None:
    weight, c_reg, c, targets = make_problem(out=2, width=6, captions=20, rows=2, condition=3.0)

    def value(flat: Matrix) -> float:
        return objective(flat.reshape(weight.shape), weight, c_reg)

    def slope(flat: Matrix) -> Matrix:
        gradient: Matrix = 2 * (flat.reshape(weight.shape) - weight) @ c_reg.T @ c_reg
        return gradient.ravel()

    def violation(flat: Matrix) -> Matrix:
        return (c @ flat.reshape(weight.shape).T - targets).ravel()

    found = minimize(
        value,
        weight.ravel(),
        jac=slope,
        constraints=[{"type": "eq", "fun": violation}],
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success
    ours = solve((weight, c_reg, c, targets))
    assert relative(found.x.reshape(weight.shape), ours) < 1e-5
    assert objective(ours, weight, c_reg) == pytest.approx(found.fun, rel=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_no_feasible_change_lowers_the_objective(seed: int) -> None:
    problem = make_problem(seed=seed)
    weight, c_reg, c, targets = problem
    best = solve(problem)
    lowest = objective(best, weight, c_reg)
    draw = np.random.default_rng(seed)
    free = np.linalg.svd(c)[2][len(c) :]  # directions that no constraint row sees
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(20):
            step = size * draw.standard_normal((len(weight), len(free))) @ free
            assert relative(c @ (best + step).T, targets) < 1e-9
            assert objective(best + step, weight, c_reg) > lowest


def test_at_the_condition_of_real_captions_the_objective_is_optimal() -> None:
    problem = make_problem(out=8, width=96, captions=600, rows=6, condition=CLIP_CONDITION)
    weight, c_reg, c, targets = problem
    ours, best = solve(problem), solve_by_elimination(*problem)
    assert objective(ours, weight, c_reg) <= 1.000001 * objective(best, weight, c_reg)
    assert relative(c @ ours.T, targets) < 1e-8


def test_half_and_single_precision_inputs_are_solved_in_double_precision() -> None:
    """In float32 the Gram matrix of such captions, condition 1.2e9, has no usable inverse."""
    problem = make_problem(out=8, width=96, captions=600, rows=6, condition=CLIP_CONDITION)
    weight, c_reg, c, targets = (torch.from_numpy(m).float() for m in problem)
    merged = constrained_least_squares(weight, c_reg, c, targets)
    assert merged.dtype == torch.float32
    rounded: Problem = tuple(t.double().numpy() for t in (weight, c_reg, c, targets))  # type: ignore[assignment]
    best = solve_by_elimination(*rounded)
    assert relative(merged.double().numpy(), best) < 1e-6
    half = constrained_least_squares(weight.half(), c_reg, c, targets)
    assert half.dtype == torch.float16


def test_the_bases_own_outputs_give_back_the_base() -> None:
    weight, c_reg, c, _ = make_problem(condition=1e3)
    same = solve((weight, c_reg, c, c @ weight.T))
    np.testing.assert_allclose(same, weight, rtol=0, atol=1e-12)


def test_as_many_constraints_as_dimensions_leave_no_choice() -> None:
    weight, c_reg, c, _ = make_problem(rows=24, condition=5.0)
    wanted = np.random.default_rng(7).standard_normal(weight.shape)
    assert relative(solve((weight, c_reg, c, c @ wanted.T)), wanted) < 1e-8


def test_the_order_of_the_constraints_does_not_matter() -> None:
    weight, c_reg, c, targets = make_problem()
    order = np.array([3, 0, 4, 1, 2])
    shuffled = solve((weight, c_reg, c[order], targets[order]))
    assert relative(shuffled, solve((weight, c_reg, c, targets))) < 1e-10


def test_the_inputs_are_not_changed() -> None:
    tensors = [torch.from_numpy(m) for m in make_problem()]
    copies = [t.clone() for t in tensors]
    constrained_least_squares(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def _tensors(problem: Problem | None = None) -> dict[str, Tensor]:
    names = ("weight", "regularization", "constraints", "targets")
    matrices = problem or make_problem()
    return {name: torch.from_numpy(m) for name, m in zip(names, matrices, strict=True)}


def _message(tensors: dict[str, Tensor]) -> str:
    with pytest.raises(MergeError) as caught:
        constrained_least_squares(**tensors)
    return str(caught.value)


def test_captions_that_do_not_span_the_features_are_refused() -> None:
    tensors = _tensors()
    flat = tensors["regularization"].clone()
    flat[:, 5] = flat[:, 3] - 2 * flat[:, 4]
    message = _message({**tensors, "regularization": flat})
    assert "span only 23 of 24 dimensions" in message
    assert "more varied, captions" in message


def test_too_few_captions_are_refused() -> None:
    tensors = _tensors()
    few = tensors["regularization"][:10]
    assert "span only 10 of 24 dimensions" in _message({**tensors, "regularization": few})


def test_duplicate_constraints_are_refused_with_what_to_do() -> None:
    tensors = _tensors()
    c = tensors["constraints"].clone()
    c[4] = c[1]
    message = _message({**tensors, "constraints": c})
    assert "Only 4 of 5 constraint rows are independent" in message
    assert "Remove duplicate rows" in message
    assert "trigger word" in message


def test_a_constraint_that_is_a_sum_of_others_is_refused() -> None:
    tensors = _tensors()
    c = tensors["constraints"].clone()
    c[4] = c[0] + c[1]
    assert "Only 4 of 5" in _message({**tensors, "constraints": c})


UNFIT: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
    ("weight", "a column less", lambda t: t[:, :-1]),
    ("weight", "a row less", lambda t: t[:-1]),
    ("weight", "a vector", lambda t: t[0]),
    ("weight", "a dimension more", lambda t: t[None]),
    ("regularization", "a column less", lambda t: t[:, :-1]),
    ("regularization", "a vector", lambda t: t[0]),
    ("regularization", "a dimension more", lambda t: t[None]),
    ("constraints", "a column less", lambda t: t[:, :-1]),
    ("constraints", "a row less", lambda t: t[:-1]),
    ("constraints", "a vector", lambda t: t[0]),
    ("targets", "a column less", lambda t: t[:, :-1]),
    ("targets", "a row less", lambda t: t[:-1]),
    ("targets", "transposed", lambda t: t.T),
]


@pytest.mark.parametrize(
    ("name", "change"), [pytest.param(n, c, id=f"{n}: {text}") for n, text, c in UNFIT]
)
def test_shapes_that_do_not_fit_are_named(name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = _tensors()
    tensors[name] = change(tensors[name])
    message = _message(tensors)
    assert "Shapes do not fit" in message
    assert str(tuple(tensors[name].shape)) in message
    assert re.search(r"needed \(o, d\), \(n, d\), \(s, d\), \(s, o\)", message)
