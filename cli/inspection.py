"""`custom-diffusion inspect`"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..concept.concept import LowRankDelta
from ..concept.file import read_concept


def add_to(commands: Any) -> None:
    look = commands.add_parser("inspect", help="what a concept file holds")
    look.add_argument("file", type=Path)
    look.set_defaults(command=inspect_command)


def inspect_command(options: argparse.Namespace) -> None:
    concept = read_concept(options.file)
    ranks = sorted({d.rank for d in concept.deltas.values() if isinstance(d, LowRankDelta)})
    print(f"{options.file}: {options.file.stat().st_size / 1e6:.1f} MB")
    print(f"base model: {concept.family.title}, projections {concept.base_hash or 'unknown'}")
    for token in concept.tokens:
        start = token.initializer or "a rare token"
        print(f"token: {token.name} {token.class_noun} (started from {start})")
    print(f"projections: {len(concept.deltas)}, {f'rank {ranks}' if ranks else 'dense'}")
    print(f"kept by a merge: {', '.join(concept.constraint_prompts) or 'nothing'}")
    for fact in ("method", "steps", "instance_images", "regularization_images", "strengths"):
        if fact in concept.provenance:
            print(f"{fact.replace('_', ' ')}: {concept.provenance[fact]}")
