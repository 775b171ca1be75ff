"""`custom-diffusion sample`"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from PIL import Image

from ..composition.routing import Route
from ..concept.atomic import write_atomically
from ..concept.errors import ConfigError
from ..concept.file import read_concept
from ..concept.fit import text_remark
from ..concept.text import text_mark
from .models import add_model_options, add_resolution_option, load_chosen, resolution_for
from .output import check_new
from .parsing import positive


def add_to(commands: Any) -> None:
    draw = commands.add_parser(
        "sample",
        help="draw pictures, with a concept or without",
        example="sample --model sd15.safetensors --route cat.safetensors mug.safetensors "
        '--prompt "a <new1> cat beside a <new2> mug"',
    )
    add_model_options(draw)
    draw.add_argument(
        "--prompt", required=True, help="of any length; weights as in ComfyUI, (cat:1.2)"
    )
    draw.add_argument("--concept", type=Path, help="a concept that is added to the whole model")
    draw.add_argument("--unet", type=Path, help="a UNet that train has saved as a whole")
    draw.add_argument(
        "--strength", type=float, default=1.0, help="of --concept; 0 is the model alone"
    )
    draw.add_argument(
        "--route",
        type=Path,
        nargs="+",
        default=[],
        metavar="CONCEPT",
        help="concepts that act only at their own words: several in one picture without a merge",
    )
    draw.add_argument("--strengths", type=float, nargs="+", help="one for each of --route")
    draw.add_argument("--count", type=positive, default=1, help="pictures, side by side")
    add_resolution_option(draw)
    draw.add_argument("--seed", type=int, default=0, help="where the random noise starts")
    draw.add_argument("--output", type=Path, default=Path("sample.png"), help="where it is saved")
    draw.set_defaults(command=sample_command)


def check_picture(output: Path) -> None:
    """Raises ConfigError for an ending that no picture can be saved with, and as `check_new`."""
    Image.init()
    try:
        kind = Image.EXTENSION[output.suffix.lower() or "."]  # a plugin may have claimed no ending
        Image.new("RGB", (8, 8)).save(io.BytesIO(), kind)
    except (KeyError, OSError, ValueError) as error:
        raise ConfigError(
            f"{output.name} has the ending {output.suffix or 'of nothing'!r}, with which no "
            f"picture can be saved. Take .png, .jpg or .webp."
        ) from error
    check_new(output)


def sample_command(options: argparse.Namespace) -> None:
    from ..host.diffusers.lending import text_encoder
    from ..host.diffusers.loading import load_network
    from ..host.diffusers.sampling import sample, side_by_side

    check_picture(options.output)
    concept = read_concept(options.concept) if options.concept else None
    routes = _routes(options)
    pipeline = load_chosen(options)
    if options.unet:
        load_network(pipeline, options.unet)
    mark = text_mark(text_encoder(pipeline))
    for one in [*([concept] if concept else []), *(route.concept for route in routes)]:
        if remark := text_remark(one, mark):
            print(f"warning: {remark}")
    pictures = sample(
        pipeline,
        [options.prompt] * options.count,
        concept,
        strength=options.strength,
        routes=routes,
        resolution=resolution_for(options, pipeline),
        seeds=range(options.seed, options.seed + options.count),
    )
    kind, picture = Image.EXTENSION[options.output.suffix.lower()], side_by_side(pictures)
    try:
        write_atomically(options.output, lambda place: picture.save(place, kind), replace=False)
    except FileExistsError as error:
        raise ConfigError(
            f"{options.output} exists by now and was not replaced. Choose another --output."
        ) from error
    print(f"saved {options.output}")


def _routes(options: argparse.Namespace) -> list[Route]:
    strengths = options.strengths or [1.0] * len(options.route)
    if len(strengths) != len(options.route):
        raise ConfigError(
            f"{len(strengths)} strengths were given for {len(options.route)} routed concepts. "
            f"Give one for each."
        )
    return [
        Route(read_concept(path), strength)
        for path, strength in zip(options.route, strengths, strict=True)
    ]
