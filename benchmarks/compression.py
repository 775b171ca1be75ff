"""Compressing an SD 1.5-sized concept: speed and error against the reference's full SVD.

32 dense float32 matrices with the shapes of SD 1.5's key and value projections. Their singular
values fall by a power law for which the paper's rule (60 % of their sum) leaves about a fifth of
the size, as the paper says of trained concepts; a second run has random matrices, whose singular
values hardly fall, which is the hardest case. Then size and error of both at several targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import _pack  # noqa: F401  (puts the pack on the path)
import torch
from _measure import interleaved, options, write_json
from custom_diffusion.compression.ranks import compress
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.delta import Delta, DenseDelta, LowRankDelta
from custom_diffusion.concept.layers import FAMILIES
from torch import Tensor

from merge import BLOCKS

FAMILY = FAMILIES["sd15"]
SHARE = 0.6
"""Of the sum of singular values: the reference's default."""
POWER = 0.85
TARGETS: tuple[dict[str, Any], ...] = (
    *({"rank": rank} for rank in (1, 4, 8, 16, 32, 64)),
    {"nuclear_share": SHARE},
    {"energy_share": 0.9},
)
MERGED_RANK = 24
"""Of a merge of two concepts with two prompts each."""

Matrices = Mapping[str, Tensor]
Truncated = Mapping[str, tuple[Tensor, Tensor]]


def draw_matrices(power: float, seed: int = 0) -> dict[str, Tensor]:
    """Singular values 1, 2^-power, 3^-power and so on; for power 0, Gaussian matrices."""
    generator = torch.Generator().manual_seed(seed)

    def draw(out: int) -> Tensor:
        count = min(out, FAMILY.context_width)
        if power == 0:
            return torch.randn(out, FAMILY.context_width, generator=generator)
        left, right = (
            torch.linalg.qr(torch.randn(side, count, generator=generator)).Q
            for side in (out, FAMILY.context_width)
        )
        return (left * torch.arange(1, count + 1) ** -power) @ right.T

    return {
        f"{block}.1.transformer_blocks.0.attn2.{kind}": draw(out)
        for out, blocks in BLOCKS.items()
        for block in blocks
        for kind in ("to_k", "to_v")
    }


def reference(matrices: Matrices) -> Truncated:
    """As the authors' script does it: a full SVD of each matrix in float32, and a running sum."""
    result = {}
    for layer, matrix in matrices.items():
        u, s, vt = torch.linalg.svd(matrix)
        total, running, rank = s.sum(), torch.zeros(()), 0
        for rank, value in enumerate(s):  # noqa: B007 (the script's own loop)
            running += value / total
            if running > SHARE:
                break
        result[layer] = (u[:, :rank] @ torch.diag(s[:rank]), vt[:rank])
    return result


def ours(matrices: Matrices) -> Truncated:
    compressed, _ = compress(dense_concept(matrices), nuclear_share=SHARE)
    return {
        layer: (delta.up, delta.down)
        for layer, delta in compressed.deltas.items()
        if isinstance(delta, LowRankDelta)
    }


def dense_concept(matrices: Matrices) -> Concept:
    deltas: dict[str, Delta] = {layer: DenseDelta(matrix) for layer, matrix in matrices.items()}
    return Concept(FAMILY, deltas)


def error(matrices: Matrices, approximations: Matrices) -> float:
    """‖ΔW − approximation‖ over ‖ΔW‖ over all layers, in float64."""
    lost = total = 0.0
    for layer, matrix in matrices.items():
        lost += float((matrix.double() - approximations[layer]).square().sum())
        total += float(matrix.double().square().sum())
    return math.sqrt(lost / total)


def products(result: Truncated) -> Matrices:
    return {layer: up.double() @ down.double() for layer, (up, down) in result.items()}


def measure(power: float, rounds: int) -> dict[str, Any]:
    matrices = draw_matrices(power)
    ways: dict[str, Callable[[Matrices], Truncated]] = {"reference": reference, "ours": ours}
    results = {name: way(matrices) for name, way in ways.items()}
    times = interleaved(
        {name: lambda way=way: way(matrices) for name, way in ways.items()},  # type: ignore[misc]
        rounds,
    )
    numbers = {
        name: sum(up.numel() + down.numel() for up, down in result.values())
        for name, result in results.items()
    }
    return {
        "power": power,
        **{f"{name}_ms": times.median(name) * 1e3 for name in ways},
        **{f"{name}_error": error(matrices, products(result)) for name, result in results.items()},
        **{f"{name}_megabytes": 2e-6 * count for name, count in numbers.items()},
        "whole_megabytes": 2e-6 * sum(matrix.numel() for matrix in matrices.values()),
        "same_ranks": all(
            results["ours"][layer][0].shape == up.shape
            for layer, (up, _) in results["reference"].items()
        ),
        "reference_over_ours": times.ratio("reference", "ours"),
    }


def measure_targets(power: float) -> list[dict[str, Any]]:
    """Size of the file in half precision, and error of what is in it, at every target."""
    matrices = draw_matrices(power)
    rows = []
    for target in TARGETS:
        compressed, report = compress(dense_concept(matrices), **target)
        half = {k: delta.to(torch.float16).dense() for k, delta in compressed.deltas.items()}
        rows.append(
            {
                "power": power,
                "target": " ".join(f"{name} {value:g}" for name, value in target.items()),
                "ranks": sorted(report.ranks().values()),
                "megabytes": 1e-6 * report.bytes_after,
                "error": error(matrices, half),
            }
        )
    return rows


def measure_merged(rounds: int) -> dict[str, float]:
    """A merged concept, through its factors and through its matrices."""
    generator = torch.Generator().manual_seed(1)
    width = FAMILY.context_width
    down = torch.linalg.qr(torch.randn(width, MERGED_RANK, generator=generator)).Q.T.contiguous()
    shapes = {layer: len(matrix) for layer, matrix in draw_matrices(0).items()}
    merged = Concept(
        FAMILY,
        {
            layer: LowRankDelta(torch.randn(out, MERGED_RANK, generator=generator), down)
            for layer, out in shapes.items()
        },
    )
    dense = {layer: delta.dense() for layer, delta in merged.deltas.items()}
    times = interleaved(
        {
            "merged": lambda: compress(merged, rank=MERGED_RANK // 2),
            "reference": lambda: reference(dense),
        },
        rounds,
    )
    return {
        "merged_ms": times.median("merged") * 1e3,
        "merged_reference_over_ours": times.ratio("reference", "merged"),
    }


def main() -> None:
    given = options(__doc__ or "", threads=2, rounds=5).parse_args()
    torch.set_num_threads(given.threads)
    print(
        f"32 matrices of SD 1.5, {SHARE:.0%} of the sum of singular values, {given.threads} threads"
    )
    results = [measure(power, given.rounds) for power in (POWER, 0.0)]
    for result in results:
        kind = f"values falling by power {result['power']:g}" if result["power"] else "random"
        print(
            f"{kind}: {result['whole_megabytes']:.1f} MB became {result['ours_megabytes']:.1f} MB "
            f"({'the same' if result['same_ranks'] else 'other'} ranks)"
        )
        for name in ("reference", "ours"):
            ms, lost = result[f"{name}_ms"], result[f"{name}_error"]
            print(f"  {name:10} {ms:9.1f} ms   relative error {lost:.9f}")
        print(f"  ours: {result['reference_over_ours']:.2f} times the reference's speed")
    targets = [row for power in (POWER, 0.0) for row in measure_targets(power)]
    for row in targets:
        print(
            f"power {row['power']:g}, {row['target']}: ranks {row['ranks'][0]} to "
            f"{row['ranks'][-1]}, {row['megabytes']:.2f} MB, relative error {row['error']:.3f}"
        )
    merged = measure_merged(given.rounds)
    print(
        f"a merge of rank {MERGED_RANK} through its factors: {merged['merged_ms']:.1f} ms, "
        f"{merged['merged_reference_over_ours']:.0f} times the reference's speed"
    )
    write_json(given.json, {"dense": results, "targets": targets, "merged": merged})


if __name__ == "__main__":
    main()
