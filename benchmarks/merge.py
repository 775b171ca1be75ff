"""Merging two SD 1.5-sized concepts: speed and accuracy against the reference formulation.

Two dense float32 concepts for the 32 key and value projections of SD 1.5, ten constrained words
each, 2400 rows of caption features. No weights are needed: the arithmetic is the same for random
ones, and the accuracy is measured on features whose spectrum is set on purpose.
"""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _pack  # noqa: F401  (puts the pack on the path)
import numpy as np
import scipy.linalg
import torch
from _measure import interleaved, options, write_json
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.delta import Delta, DenseDelta, LowRankDelta
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.merge.merging import DEFAULT_RELATIVE_RIDGE, merged_deltas
from custom_diffusion.merge.projector import CaptionFactor, caption_factor, constraint_projector
from custom_diffusion.merge.rows import ConstraintRow
from safetensors.torch import load_file, save_file
from torch import Tensor

FAMILY = FAMILIES["sd15"]
BLOCKS = {
    320: ("input_blocks.1", "input_blocks.2", *(f"output_blocks.{i}" for i in (9, 10, 11))),
    640: ("input_blocks.4", "input_blocks.5", *(f"output_blocks.{i}" for i in (6, 7, 8))),
    1280: (
        *("input_blocks.7", "input_blocks.8", "middle_block"),
        *(f"output_blocks.{i}" for i in (3, 4, 5)),
    ),
}
ROWS_PER_CONCEPT = 10
CAPTIONS, CAPTION_ROWS = 200, 2400
FEATURE_NORM = 27.5
"""Length of a text feature of CLIP-L after its final layer norm."""
RELATIVE_CHANGE = 0.02
"""Size of a concept's change over the size of the weight it changes."""
WELL_CONDITION, ILL_CONDITION = 3.6, 3.5e4


@dataclass(frozen=True)
class Problem:
    """Everything both formulations start from."""

    base: Mapping[str, Tensor]
    """W₀ of each layer; only the reference needs it."""
    concepts: tuple[Concept, ...]
    trained: tuple[Mapping[str, Tensor], ...]
    """W₀ + ΔW of each concept, what the reference's files hold."""
    rows: tuple[ConstraintRow, ...]
    constraints: Tensor
    captions: Tensor


def draw_problem(condition: float, seed: int) -> Problem:
    """Two concepts of true shape, and caption features of this condition number."""
    generator = torch.Generator().manual_seed(seed)
    width = FAMILY.context_width

    def draw(out: int, size: float) -> Tensor:
        return torch.randn(out, width, generator=generator) * (size / math.sqrt(width))

    layers = {
        f"{block}.1.transformer_blocks.0.attn2.{kind}": out
        for out, blocks in BLOCKS.items()
        for block in blocks
        for kind in ("to_k", "to_v")
    }
    base = {layer: draw(out, 1.0) for layer, out in layers.items()}
    changes = [
        {layer: draw(out, RELATIVE_CHANGE) for layer, out in layers.items()} for _ in range(2)
    ]
    captions, constraints = draw_features(condition, generator)
    return Problem(
        base=base,
        concepts=tuple(
            Concept(FAMILY, {layer: DenseDelta(change) for layer, change in own.items()})
            for own in changes
        ),
        trained=tuple({layer: base[layer] + own[layer] for layer in layers} for own in changes),
        rows=tuple(ConstraintRow(n, "", i) for n in range(2) for i in range(ROWS_PER_CONCEPT)),
        constraints=constraints,
        captions=captions,
    )


def draw_features(condition: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Caption features (2400, 768) whose singular values fall by a power law to 1 / `condition`,
    and constraint rows (20, 768) from the same distribution.
    """
    width = FAMILY.context_width

    def orthonormal(n: int) -> Tensor:
        square = torch.randn(n, width, generator=generator, dtype=torch.float64)
        basis: Tensor = torch.linalg.qr(square).Q
        return basis

    place = torch.arange(1, width + 1, dtype=torch.float64).log() / math.log(width)
    spread = condition ** -place[:, None] * orthonormal(width)
    words = torch.randn(2 * ROWS_PER_CONCEPT, width, generator=generator, dtype=torch.float64)
    scale = FEATURE_NORM / spread.norm()
    return (
        (orthonormal(CAPTION_ROWS) @ spread * (scale * CAPTION_ROWS**0.5)).float(),
        (words @ spread * scale).float(),
    )


# The competitors


def reference_merge(problem: Problem, *, with_loss: bool = False) -> dict[str, Tensor]:
    """Eq. 5 as the authors' script evaluates it, in float32: the whole matrix of every layer.

    The captions' Gram matrix is the same for every layer, yet is built and factorised again for
    each, by scipy; constraint rows are solved one by one, and the small matrix is inverted. The
    script also prints, for every layer, the error of each constraint and caption row: `with_loss`
    adds it.
    """
    captions, constraints = problem.captions, problem.constraints
    own_rows = constraints.split(ROWS_PER_CONCEPT)
    merged = {}
    for layer, weight in problem.base.items():
        wanted = torch.cat(
            [own[layer] @ c.T for own, c in zip(problem.trained, own_rows, strict=True)], dim=1
        )
        factors = scipy.linalg.lu_factor((captions.T @ captions).numpy())
        solved = [scipy.linalg.lu_solve(factors, row[:, None].numpy()) for row in constraints]
        d = torch.from_numpy(np.concatenate(solved, axis=1)).T
        missing = wanted - weight @ constraints.T
        merged[layer] = weight + missing @ torch.linalg.inv(d @ constraints.T) @ d
        if with_loss:
            kept = captions @ weight.T
            inputs = torch.cat([constraints, captions])
            outputs = torch.cat([wanted.T, kept])
            ((merged[layer] @ inputs.T).T - outputs).norm(dim=1)
    return merged


def our_factor(problem: Problem, relative_ridge: float) -> CaptionFactor:
    return caption_factor(problem.captions, CAPTIONS, relative_ridge)


def our_merge(problem: Problem, factor: CaptionFactor) -> dict[str, Delta]:
    """The pack's merge, from the caption factor on."""
    projector = constraint_projector(factor, problem.constraints)
    mixing = torch.eye(len(problem.rows), dtype=torch.float64)  # no two rows are the same word
    features = problem.constraints.double()
    deltas, _ = merged_deltas(
        problem.concepts, (1.0, 1.0), problem.rows, features, mixing, projector
    )
    return deltas


# Speed

COMPETITORS = ("reference", "reference_with_loss", "ours", "ours_cached")


def measure_speed(rounds: int) -> dict[str, float]:
    """Milliseconds of each competitor, and the paired ratios of the references to ours."""
    problem = draw_problem(WELL_CONDITION, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        cached = Path(folder) / "factor.safetensors"
        save_file({"upper": our_factor(problem, DEFAULT_RELATIVE_RIDGE).upper}, cached)
        runs = (
            lambda: reference_merge(problem),
            lambda: reference_merge(problem, with_loss=True),
            lambda: our_merge(problem, our_factor(problem, DEFAULT_RELATIVE_RIDGE)),
            lambda: our_merge(problem, CaptionFactor(load_file(cached)["upper"], CAPTIONS)),
        )
        times = interleaved(dict(zip(COMPETITORS, runs, strict=True)), rounds)
    return {f"{name}_ms": times.median(name) * 1e3 for name in COMPETITORS} | {
        f"{reference}_over_{ours}": times.ratio(reference, ours)
        for reference in COMPETITORS[:2]
        for ours in COMPETITORS[2:]
    }


# Accuracy


@dataclass(frozen=True)
class Accuracy:
    """How good a merge is; every number is best when it is small."""

    objective: float
    """‖ΔW C_regᵀ‖² over all layers, over the least that exact constraints allow."""
    residual: float
    """‖(ΔW − D) Cᵀ‖ over ‖D Cᵀ‖, all layers and constraint rows."""
    change: float
    """‖ΔW‖ over ‖W₀‖: what the objective does not see, and a ridge holds down."""


def optimal_projector(problem: Problem) -> Tensor:
    """P (s, d) in float64 by another way than the pack's: least squares in the null space of C.

    A row x of ΔW with C x = t is x = Q₁ R⁻ᵀ t + Q₂ z, where Cᵀ = [Q₁ Q₂] R and z is free.
    """
    captions, constraints = problem.captions.double(), problem.constraints.double()
    q, r = torch.linalg.qr(constraints.T, mode="complete")
    rank = len(constraints)
    least_norm = torch.linalg.solve_triangular(r[:rank].T, q[:, :rank], upper=False, left=False)
    free: Tensor = torch.linalg.lstsq(
        captions @ q[:, rank:], -captions @ least_norm, driver="gelsd"
    ).solution
    solution: Tensor = least_norm + q[:, rank:] @ free
    return solution.T


def accuracy(problem: Problem, changes: Mapping[str, Tensor], optimum: Tensor) -> Accuracy:
    """Judges ΔW of every layer, in float64."""
    captions, constraints = problem.captions.double(), problem.constraints.double()
    own_rows = constraints.split(ROWS_PER_CONCEPT)
    objective = least = error = size = moved = whole = 0.0
    for layer, change in changes.items():
        asked = torch.cat(
            [
                concept.deltas[layer].map_rows(rows)
                for concept, rows in zip(problem.concepts, own_rows, strict=True)
            ]
        )
        objective += float((captions @ change.T).square().sum())
        least += float((captions @ optimum.T @ asked).square().sum())
        error += float((constraints @ change.T - asked).square().sum())
        size += float(asked.square().sum())
        moved += float(change.square().sum())
        whole += float(problem.base[layer].square().sum())
    return Accuracy(objective / least, math.sqrt(error / size), math.sqrt(moved / whole))


def measure_accuracy(condition: float) -> dict[str, Any]:
    problem = draw_problem(condition, seed=1)
    optimum = optimal_projector(problem)
    whole = reference_merge(problem)
    merged = {"reference": {k: whole[k].double() - w.double() for k, w in problem.base.items()}}
    for name, ridge in (("ours_no_ridge", 0.0), ("ours", DEFAULT_RELATIVE_RIDGE)):
        deltas = our_merge(problem, our_factor(problem, ridge))
        merged[name] = {layer: dense(delta) for layer, delta in deltas.items()}
    projector = constraint_projector(our_factor(problem, 0.0), problem.constraints)
    return {
        "condition": condition,
        "constraint_condition": projector.condition,
        "damped": projector.damped,
        **{name: asdict(accuracy(problem, change, optimum)) for name, change in merged.items()},
    }


def dense(delta: Delta) -> Tensor:
    """The matrix in float64, so that its own rounding is not judged."""
    assert isinstance(delta, LowRankDelta), "a merge gives factors"
    return delta.up.double() @ delta.down.double()


def main() -> None:
    given = options(__doc__ or "", threads=2, rounds=7).parse_args()
    torch.set_num_threads(given.threads)
    speed = measure_speed(given.rounds)
    print("two SD 1.5-sized concepts, 20 constraint rows, 2400 x 768 caption features")
    for name in COMPETITORS:
        print(f"  {name:20} {speed[name + '_ms']:9.1f} ms")
    for name in COMPETITORS[2:]:
        without, with_loss = (speed[f"{reference}_over_{name}"] for reference in COMPETITORS[:2])
        print(f"  {name}: {without:.1f} times the reference's speed, {with_loss:.1f} with its loss")
    accuracies = [measure_accuracy(condition) for condition in (WELL_CONDITION, ILL_CONDITION)]
    for result in accuracies:
        exact = "damped" if result["damped"] else "exact"
        print(
            f"caption features of condition {result['condition']:g}, constraints of condition "
            f"{result['constraint_condition']:.2f} ({exact})"
        )
        for name in ("reference", "ours_no_ridge", "ours"):
            print(
                f"  {name:14} objective / optimum {result[name]['objective']:.9g}, residual "
                f"{result[name]['residual']:.2e}, change {result[name]['change']:.3g}"
            )
    write_json(given.json, {"speed": speed, "accuracy": accuracies})


if __name__ == "__main__":
    main()
