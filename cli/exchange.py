"""`custom-diffusion import` and `custom-diffusion export`"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from ..concept.errors import ConfigError
from ..concept.file import read_concept, size_of
from ..formats.base import BaseModel
from ..formats.exporting import FORMATS, bake, export_concept
from ..formats.importing import open_concept
from .models import base_model
from .output import check_new, save

CHECKPOINT = "checkpoint"  # a base model with the concept in its weights


def add_to(commands: Any) -> None:
    taken = commands.add_parser(
        "import",
        help="turn another tool's file into a concept",
        example="import delta.bin --base sd15.safetensors --class-noun cat "
        "--output theirs.safetensors",
    )
    taken.add_argument("file", type=Path, help="delta, LoRA or embedding")
    taken.add_argument("--base", help="its base model, if the file holds whole weights")
    taken.add_argument(
        "--class-noun", default="", metavar="WORD", help="the everyday word for the subject"
    )
    taken.add_argument("--token", metavar="WORD", help="another trigger word for it")
    taken.add_argument(
        "--output", type=Path, default=Path("concept.safetensors"), help="where it is saved"
    )
    taken.set_defaults(command=import_command)

    given = commands.add_parser(
        "export",
        help="write a concept as another tool's file",
        example="export cat.safetensors --format kohya-lora --output for-a1111",
    )
    given.add_argument("concept", type=Path)
    given.add_argument(
        "--format", choices=[*FORMATS, CHECKPOINT], required=True, help="see docs/formats.md"
    )
    given.add_argument("--base", help="its base model, for formats with whole weights")
    given.add_argument("--full", action="store_true", help="float32 instead of half precision")
    given.add_argument(
        "--output", type=Path, required=True, help="where it is saved; the format adds its ending"
    )
    given.set_defaults(command=export_command)


def import_command(options: argparse.Namespace) -> None:
    check_new(options.output)
    opened = open_concept(options.file, _base(options), options.class_noun)
    print(f"{options.file} is {opened.title}")
    for fact in opened.facts:
        print(fact)
    for note in opened.notes:
        print(f"note: {note}")
    concept = opened.concept.with_token(options.token) if options.token else opened.concept
    save(concept, options.output)


def export_command(options: argparse.Namespace) -> None:
    concept = read_concept(options.concept)
    if options.format == CHECKPOINT:
        if not options.base or not os.path.isfile(options.base):
            raise ConfigError(
                f"--format {CHECKPOINT} writes a copy of a checkpoint with the concept in it. Give "
                f"the checkpoint that the concept was trained on as --base FILE."
            )
        words = bake(concept, Path(options.base), options.output)
        print(f"saved {options.output}")
        if words:
            print(
                f"note: a checkpoint cannot hold {', '.join(words)}: export the concept with "
                f"--format embeddings, too"
            )
        return
    dtype = torch.float32 if options.full else torch.float16
    for path in export_concept(concept, options.output, options.format, _base(options), dtype):
        print(f"saved {path} ({size_of(path)})")


def _base(options: argparse.Namespace) -> BaseModel | None:
    return base_model(options.base) if options.base else None
