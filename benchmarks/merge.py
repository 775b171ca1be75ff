"""Merging two SD 1.5-sized concepts: speed and accuracy against the reference formulation.

Two dense float32 concepts with the 32 key and value projections of SD 1.5, ten constrained words
each, 2400 rows of caption features. No weights are needed: the arithmetic is the same for random
ones, and the accuracy is measured on features whose spectrum is set on purpose.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import _pack  # noqa: F401  (puts the pack on the path)
import torch
from _measure import interleaved, options, write_json
from custom_diffusion.concept.concept import Concept, Delta, DenseDelta
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.merge.compose import DEFAULT_RELATIVE_RIDGE, ConstraintRow, merged_deltas
from custom_diffusion.merge.projector import CaptionFactor, caption_factor, constraint_projector
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
ILL_CONDITION = 3.5e4


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


def draw_problem(captions: Tensor, generator: torch.Generator) -> Problem:
    """Two concepts of true shape for these caption features (n, 768)."""
    width = FAMILY.context_width

    def draw(out: int, size: float) -> Tensor:
        return torch.randn(out, width, generator=generator) * (size / width**0.5)

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
    directions = torch.randn(2 * ROWS_PER_CONCEPT, width, generator=generator)
    return Problem(
        base=base,
        concepts=tuple(
            Concept(FAMILY, {layer: DenseDelta(change) for layer, change in own.items()})
            for own in changes
        ),
        trained=tuple({layer: base[layer] + own[layer] for layer in layers} for own in changes),
        rows=tuple(ConstraintRow(n, "", i) for n in range(2) for i in range(ROWS_PER_CONCEPT)),
        constraints=torch.nn.functional.normalize(directions) * FEATURE_NORM,
        captions=captions,
    )


def caption_features(condition: float, generator: torch.Generator) -> Tensor:
    """Features (2400, 768) whose singular values fall by a power law to 1 / `condition`."""
    width = FAMILY.context_width
    left, right = (
        torch.linalg.qr(torch.randn(n, width, generator=generator, dtype=torch.float64)).Q
        for n in (CAPTION_ROWS, width)
    )
    place = torch.arange(1, width + 1, dtype=torch.float64).log() / torch.tensor(width).log()
    features = (left * condition**-place) @ right.T
    return (features * (FEATURE_NORM * (CAPTION_ROWS / features.square().sum()).sqrt())).float()


# The competitors


def reference_merge(problem: Problem) -> dict[str, Tensor]:
    """Eq. 5 as the authors' script evaluates it, in float32: the whole matrix of every layer.

    The Gram matrix of the captions is the same for every layer, and is factorised again for each;
    constraint rows are solved one at a time, and the small matrix is inverted. The loss that the
    script prints of every layer is left out, in its favour.
    """
    captions, constraints = problem.captions, problem.constraints
    gram = captions.T @ captions
    merged = {}
    for layer, weight in problem.base.items():
        wanted = torch.cat(
            [
                own[layer] @ rows.T
                for own, rows in zip(
                    problem.trained, constraints.split(ROWS_PER_CONCEPT), strict=True
                )
            ],
            dim=1,
        )
        lu, pivots = torch.linalg.lu_factor(gram)
        solved = [torch.linalg.lu_solve(lu, pivots, row[:, None]) for row in constraints]
        d = torch.cat(solved, dim=1).T
        missing = wanted - weight @ constraints.T
        merged[layer] = weight + missing @ torch.linalg.inv(d @ constraints.T) @ d
    return merged


def our_merge(problem: Problem, factor: CaptionFactor) -> dict[str, Delta]:
    """The pack's merge, from the caption factor on."""
    projector = constraint_projector(factor, problem.constraints)
    mixing = torch.eye(len(problem.rows), dtype=torch.float64)  # no two rows are the same word
    features = problem.constraints.double()
    deltas, _ = merged_deltas(
        problem.concepts, (1.0, 1.0), problem.rows, features, mixing, projector
    )
    return deltas


def our_factor(problem: Problem, relative_ridge: float) -> CaptionFactor:
    return caption_factor(problem.captions, CAPTIONS, relative_ridge)
