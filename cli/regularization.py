"""`custom-diffusion regularize` and `retrieve`: pictures of the class, drawn or found."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..host.open_clip.text import MODEL, MODELS
from ..trainer.data.training_concept import instance_caption
from ..trainer.jobs.fingerprint import models_fingerprint
from ..trainer.regularization.caption_index import CaptionIndex
from ..trainer.regularization.collection import parts_of
from ..trainer.regularization.drawn import generated_set
from ..trainer.regularization.retrieved import COUNT, LEAST_SIMILARITY, retrieve
from .models import (
    add_device_option,
    add_model_options,
    add_resolution_option,
    load_chosen,
    resolution_for,
)
from .output import progress
from .parsing import positive

_CLASS_NOUN = "the everyday word for the subject: cat"


def add_to(commands: Any) -> None:
    regularize = commands.add_parser(
        "regularize",
        help="let the model draw ordinary pictures of the class",
        description="Draws ordinary pictures of the class into a folder, for `train "
        "--regularization`. "
        "Stop it at any time: the same command resumes. Photographs of the class work better.",
        example="regularize --model sd15.safetensors --class-noun cat --output ordinary_cats",
    )
    add_model_options(regularize)
    regularize.add_argument("--class-noun", required=True, metavar="WORD", help=_CLASS_NOUN)
    regularize.add_argument("--count", type=positive, default=200, help="how many pictures")
    add_resolution_option(regularize)
    regularize.add_argument("--steps", type=int, default=25, help="sampling steps (DDIM)")
    regularize.add_argument(
        "--guidance", type=float, default=6.0, help="how closely they follow the prompt (CFG)"
    )
    regularize.add_argument("--seed", type=int, default=0, help="where the random noise starts")
    regularize.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="where they go"
    )
    regularize.set_defaults(command=regularize_command)

    find = commands.add_parser(
        "retrieve",
        help="find ordinary pictures of the class in a captioned collection of your own",
        description="Copies the pictures whose captions are nearest to the class into a folder, "
        "for `train --regularization`. The collection may be folders with .txt files, webdataset "
        "shards or parquet tables (img2dataset writes all of them), of any size: captions are "
        "read once.",
        example="retrieve --collection laion --class-noun cat "
        "--clip-weights open_clip_model.safetensors --output real_cats",
    )
    find.add_argument(
        "--collection", type=Path, required=True, metavar="FOLDER", help="your captioned pictures"
    )
    find.add_argument("--class-noun", required=True, metavar="WORD", help=_CLASS_NOUN)
    find.add_argument("--prompt", help="default: 'photo of a' and the class noun")
    find.add_argument("--count", type=positive, default=COUNT, help="how many pictures at most")
    find.add_argument(
        "--similarity",
        type=float,
        default=LEAST_SIMILARITY,
        help="minimum similarity of a caption, 0 to 1; raise it for closer matches",
    )
    find.add_argument(
        "--clip",
        default=MODEL,
        choices=MODELS,
        metavar="MODEL",
        help="the model of --clip-weights, as open_clip calls it",
    )
    find.add_argument(
        "--clip-weights",
        type=Path,
        required=True,
        metavar="FILE",
        help="its weights, usually open_clip_model.safetensors; nothing is downloaded",
    )
    find.add_argument(
        "--index",
        type=Path,
        default=Path("caption-index"),
        metavar="FOLDER",
        help="keeps what was read, so that captions are read once",
    )
    add_device_option(find)
    find.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where they go")
    find.set_defaults(command=retrieve_command)


def regularize_command(options: argparse.Namespace) -> None:
    from ..host.diffusers.lending import borrowed_models
    from ..host.diffusers.sampling import sample

    pipeline = load_chosen(options)
    resolution = resolution_for(options, pipeline)
    caption = instance_caption("", options.class_noun)
    with borrowed_models(pipeline) as models:
        settings = {
            "model": models_fingerprint(models.text_encoder, (pipeline.unet, pipeline.vae)),
            "seed": options.seed,
            "steps": options.steps,
            "guidance": options.guidance,
            "resolution": resolution,
        }
    with tqdm(desc=f"drawing {caption!r}", unit="picture") as bar:
        generated_set(
            options.output,
            settings,
            caption,
            options.count,
            lambda numbers: sample(
                pipeline,
                [caption] * len(numbers),
                resolution=resolution,
                seeds=[options.seed + number for number in numbers],
                steps=options.steps,
                guidance=options.guidance,
            ),
            on_progress=progress(bar),
        )
    print(f"{options.count} pictures are in {options.output}")


def retrieve_command(options: argparse.Namespace) -> None:
    from ..host.open_clip.text import OpenClipText

    parts_of(options.collection)  # a wrong folder is refused before CLIP is loaded
    embed = OpenClipText(options.clip, options.clip_weights, options.device)
    index = CaptionIndex(options.collection, options.index, embed.name)
    with tqdm(desc="reading captions", unit="part") as bar:
        captions = index.update(embed, progress(bar))
    prompt = options.prompt or instance_caption("", options.class_noun)
    got = retrieve(index, embed, prompt, options.output, options.count, options.similarity)
    print(
        f"{len(got.images)} of {captions} pictures are in {options.output}: similarity to "
        f"{prompt!r} at least {got.least_similarity:.2f}; {got.broken} broken ones passed over"
    )
