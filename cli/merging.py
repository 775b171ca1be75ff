"""`custom-diffusion merge`"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..concept.errors import ConfigError
from ..concept.file import read_concept
from ..merge.merging import DEFAULT_RELATIVE_RIDGE, check_mergeable, merge_concepts
from .models import captions_for, load
from .output import check_new, save


def add_to(commands: Any) -> None:
    merge = commands.add_parser(
        "merge",
        help="merge concepts into one file",
        description="Merges concepts of one model into one file, without training. Each keeps its "
        "look at its own words.",
        example="merge cat.safetensors mug.safetensors --model sd15.safetensors "
        "--output both.safetensors",
    )
    merge.add_argument("concepts", type=Path, nargs="+", metavar="CONCEPT")
    merge.add_argument("--model", required=True, help="the model that they were trained on")
    merge.add_argument(
        "--strengths", type=float, nargs="+", help="how strongly, one for each concept"
    )
    merge.add_argument(
        "--tokens", nargs="+", metavar="WORD", help="another trigger word for each concept"
    )
    merge.add_argument(
        "--captions",
        type=Path,
        help="ordinary captions, one a line, whose pictures must not change; default: ours",
    )
    merge.add_argument(
        "--ridge",
        type=float,
        default=DEFAULT_RELATIVE_RIDGE,
        help="raise it if the report says that the rest of the model changed a lot",
    )
    merge.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="keeps what was computed of the captions, for the next merge",
    )
    merge.add_argument(
        "--output", type=Path, default=Path("merged.safetensors"), help="where it is saved"
    )
    merge.set_defaults(command=merge_command)


def merge_command(options: argparse.Namespace) -> None:
    from ..host.diffusers.lending import text_encoder

    check_new(options.output)
    concepts = [read_concept(path) for path in options.concepts]
    if options.tokens:
        if len(options.tokens) != len(concepts):
            raise ConfigError(
                f"{len(options.tokens)} trigger words were given for {len(concepts)} concepts. "
                f"Give one for each."
            )
        renamed = zip(concepts, options.tokens, strict=True)
        concepts = [concept.with_token(token) for concept, token in renamed]
    strengths = options.strengths or [1.0] * len(concepts)
    check_mergeable(concepts, strengths)  # here too: loading the model takes a minute
    with tqdm(total=100, desc="merging", unit="%") as bar:
        merged, report = merge_concepts(
            concepts,
            text_encoder(load(options.model)),
            strengths=strengths,
            captions=captions_for(options.model, options.captions),
            relative_ridge=options.ridge,
            cache_folder=options.cache,
            on_progress=lambda fraction: show_percent(fraction, bar),
        )
    print(report.text())
    save(merged, options.output)


def show_percent(fraction: float, bar: tqdm[None]) -> None:
    bar.update(int(100 * fraction) - bar.n)
