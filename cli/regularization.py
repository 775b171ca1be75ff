"""`custom-diffusion regularize` and `retrieve`: pictures of the class, drawn or found."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..host.open_clip.text import MODEL, MODELS
from ..trainer.data.training_concept import instance_caption
from ..trainer.jobs.fingerprint import models_fingerprint
from ..trainer.regularization.caption_index import CaptionIndex
from ..trainer.regularization.collection import parts_of
from ..trainer.regularization.drawn import generated_set
from ..trainer.regularization.retrieved import COUNT, LEAST_SIMILARITY, retrieve
from .models import DEFAULTS, add_model_options, load_chosen, recipe_for
from .output import progress
from .parsing import positive


def add_to(commands: Any) -> None:
    regularize = commands.add_parser(
        "regularize",
        help="let the model draw a regularization set",
        description="Draws pictures of the bare class into a folder, for `train --regularization`. "
        "Stop it at any time: the same command resumes. Photographs of the class work better.",
        example="regularize --model sd15 --class-noun cat --output ordinary_cats",
    )
    add_model_options(regularize)
    regularize.add_argument("--class-noun", required=True)
    regularize.add_argument("--count", type=positive, default=200)
    regularize.add_argument(
        "--resolution", type=int, help=f"default {DEFAULTS.resolution}; take 1024 for SDXL"
    )
    regularize.add_argument("--steps", type=int, default=25, help="of the sampler, DDIM")
    regularize.add_argument("--guidance", type=float, default=6.0)
    regularize.add_argument("--seed", type=int, default=0)
    regularize.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    regularize.set_defaults(command=regularize_command)

    find = commands.add_parser(
        "retrieve",
        help="take a regularization set from a captioned collection of your own",
        description="Copies the pictures whose captions are nearest to the class into a folder, "
        "for `train --regularization`. The collection may be folders with .txt files, webdataset "
        "shards or parquet tables (img2dataset writes all of them), of any size: captions are "
        "read once.",
        example="retrieve --collection laion --class-noun cat "
        "--clip-weights open_clip_model.safetensors --output real_cats",
    )
    find.add_argument("--collection", type=Path, required=True, metavar="FOLDER")
    find.add_argument("--class-noun", required=True)
    find.add_argument("--prompt", help="default: 'photo of a' and the class noun")
    find.add_argument("--count", type=positive, default=COUNT)
    find.add_argument("--similarity", type=float, default=LEAST_SIMILARITY, help="at least, 0..1")
    find.add_argument(
        "--clip", default=MODEL, choices=MODELS, metavar="MODEL", help=f"default {MODEL}"
    )
    find.add_argument(
        "--clip-weights",
        type=Path,
        required=True,
        metavar="FILE",
        help="its weights, usually open_clip_model.safetensors; nothing is downloaded",
    )
    find.add_argument("--index", type=Path, default=Path("caption-index"), metavar="FOLDER")
    find.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    find.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    find.set_defaults(command=retrieve_command)


def regularize_command(options: argparse.Namespace) -> None:
    from ..host.diffusers.lending import borrowed_models
    from ..host.diffusers.sampling import sample

    pipeline = load_chosen(options)
    resolution = options.resolution or recipe_for(options.model).resolution
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
