"""`custom-diffusion demo`"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .models import need_miniature


def add_to(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="the whole way on a small model that comes with this, in minutes",
        example="demo",
    )
    demo.add_argument(
        "--output", type=Path, default=Path("demo"), metavar="FOLDER", help="where it is saved"
    )
    demo.set_defaults(command=demo_command)


def demo_command(options: argparse.Namespace) -> None:
    need_miniature()
    from ..miniature.demo import run_demo

    run_demo(options.output)
