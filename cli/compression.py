"""`custom-diffusion compress`"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..compression.ranks import compress
from ..concept.atomic import write_atomically
from ..concept.concept import Concept
from ..concept.errors import ConfigError
from ..concept.file import read_concept
from ..merge.projection import project_on_own_words
from .models import captions_for, load
from .output import check_new, save


def add_to(commands: Any) -> None:
    small = commands.add_parser(
        "compress",
        help="make a concept's file smaller",
        description="Makes a concept's file smaller. Choose how: by rank, by share, by size, or to "
        "what it does at its own words.",
        example="compress cat.safetensors --megabytes 3 --output small.safetensors",
    )
    small.add_argument("file", type=Path)
    target = small.add_mutually_exclusive_group(required=True)
    target.add_argument("--rank", type=int, help="rank of every layer")
    target.add_argument(
        "--nuclear",
        type=float,
        metavar="SHARE",
        help="of each layer's singular values that is kept; the paper takes 0.6",
    )
    target.add_argument(
        "--energy",
        type=float,
        metavar="SHARE",
        help="of the whole change that is kept, over all layers",
    )
    target.add_argument("--megabytes", type=float, metavar="MB", help="largest size of the file")
    target.add_argument(
        "--own-words",
        action="store_true",
        help="keep only what it does at its own words, about a hundredth; needs --model",
    )
    small.add_argument("--model", help="with --own-words: the model that it was trained on")
    small.add_argument("--output", type=Path, required=True, help="where it is saved")
    small.add_argument(
        "--plot", type=Path, metavar="PICTURE", help="a picture of what is lost (PNG)"
    )
    small.set_defaults(command=compress_command)


def compress_command(options: argparse.Namespace) -> None:
    from ..compression.spectrum_plot import spectrum_plot

    check_new(options.output)
    concept = read_concept(options.file)
    if options.own_words:
        _project(options, concept)
        return
    compressed, report = compress(
        concept,
        rank=options.rank,
        nuclear_share=options.nuclear,
        energy_share=options.energy,
        megabytes=options.megabytes,
    )
    print(report.text())
    save(compressed, options.output)
    if options.plot:
        picture = spectrum_plot(concept, report.spectra, report.ranks())
        write_atomically(options.plot, lambda temporary: picture.save(temporary, "PNG"))
        print(f"saved {options.plot}")


def _project(options: argparse.Namespace, concept: Concept) -> None:
    from ..host.diffusers.lending import text_encoder

    if not options.model or options.plot:
        raise ConfigError(
            "--own-words needs the base model's text encoder and has no plot of singular values. "
            "Give --model, and leave --plot out."
        )
    projected, report = project_on_own_words(
        concept, text_encoder(load(options.model)), captions=captions_for(options.model)
    )
    print(report.text())
    save(projected, options.output)
