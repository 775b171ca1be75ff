"""`custom-diffusion distance`"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..concept.errors import ConfigError
from ..concept.file import read_concept
from ..inspection.report import aligned
from ..merge.distance import concept_distances, distance_table
from ..merge.merging import check_mergeable
from .models import captions_for, load
from .output import progress


def add_to(commands: Any) -> None:
    distance = commands.add_parser(
        "distance",
        help="say how close concepts are, before you merge them",
        description="For every two concepts: how alike their trigger words are, and how much of "
        "what a merge must keep of one belongs to the other (overlap, 0 to 1).",
        example="distance cat.safetensors dog.safetensors --model sd15.safetensors",
    )
    distance.add_argument("concepts", type=Path, nargs="+", metavar="CONCEPT")
    distance.add_argument("--model", required=True, help="the model that they were trained on")
    distance.add_argument(
        "--captions", type=Path, help="ordinary captions, one a line; default: ours"
    )
    distance.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="keeps what was computed of the captions, for the next time",
    )
    distance.set_defaults(command=distance_command)


def distance_command(options: argparse.Namespace) -> None:
    from ..host.diffusers.lending import text_encoder

    if len(options.concepts) < 2:
        raise ConfigError("One concept was given. Give two or more to compare.")
    concepts = [read_concept(path) for path in options.concepts]
    check_mergeable(concepts, [1.0] * len(concepts))  # here too: loading the model takes a minute
    with tqdm(total=100, desc="reading captions", unit="%") as bar:
        show = progress(bar)
        pairs = concept_distances(
            concepts,
            text_encoder(load(options.model)),
            captions=captions_for(options.model, options.captions),
            cache_folder=options.cache,
            on_progress=lambda fraction: show(int(100 * fraction), 100),
        )
    print("\n".join(aligned(distance_table(pairs, [path.stem for path in options.concepts]))))
