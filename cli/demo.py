"""`custom-diffusion demo`"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ..concept.file import read_concept
from .models import MINIATURE, need_miniature


def add_to(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="the whole way on a small model that comes with this, in minutes",
        description="Teaches two concepts to the miniature model, which comes with this, merges "
        "them, and draws them alone and together. Nothing is downloaded.",
        example="demo",
    )
    demo.add_argument(
        "--output", type=Path, default=Path("demo"), metavar="FOLDER", help="where it is saved"
    )
    demo.set_defaults(command=demo_command)


def demo_command(options: argparse.Namespace) -> None:
    need_miniature()
    from ..miniature.demo import run_demo

    picture = run_demo(options.output)
    print(what_next(picture, options.output / "both.safetensors"))


def what_next(picture: Path, merged: Path) -> str:
    """What to look at and to try, as commands that work where this one did."""
    subjects = [f"{token.name} {token.class_noun}" for token in read_concept(merged).tokens]
    swapped = f"photo of a {' and a '.join(reversed(subjects))}"
    program = _program()
    return f"""
Look at {picture}. What to try next:

  Draw another prompt. docs/fidelity.md lists the words that the miniature model knows.
    {program} sample --model {MINIATURE} --concept {merged} --prompt "{swapped}"

  Teach your own cat, from 4 to 20 photographs and a Stable Diffusion checkpoint.
    {program} train --model your_model.safetensors --images your_photos --class-noun cat

  Or in ComfyUI: copy this folder into ComfyUI/custom_nodes, and open the template
  "1 Teach a concept"."""


def _program() -> str:
    """How this program was called."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return "python -m custom_diffusion"
    return os.path.relpath(called) if called.parent != Path() else called.name
