"""`custom-diffusion compose`: pictures of several subjects, made of the pictures that there are."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from ..concept.atomic import write_atomically, write_text_atomically
from ..trainer.data.composing import backgrounds_of, compose, composed_words
from ..trainer.data.folders import load_folder
from .output import check_new
from .parsing import positive
from .training_concepts import add_subject_options, training_concepts


def add_to(commands: Any) -> None:
    paste = commands.add_parser(
        "compose",
        help="make pictures with several subjects out of pictures with masks",
        description="Cuts the subjects out by their masks and pastes them beside each other onto "
        "backgrounds, into a folder of pictures with captions and masks, for `train --images`. "
        "The same seed gives the same pictures.",
        example="compose --images photos/cat photos/dog --class-noun cat dog --backgrounds places "
        "--output cat_and_dog",
    )
    add_subject_options(paste)
    paste.add_argument(
        "--backgrounds",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="places without the subjects; beach.txt next to beach.jpg says what captions say of "
        "it: on a beach",
    )
    paste.add_argument("--count", type=positive, default=16, help="how many pictures to compose")
    paste.add_argument(
        "--resolution", type=positive, default=512, help="edge of the pictures in pixels"
    )
    paste.add_argument("--seed", type=int, default=0, help="decides what goes where")
    paste.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="a new folder for them"
    )
    paste.set_defaults(
        command=compose_command,
        **dict.fromkeys(("initializer", "regularization", "kind", "start")),
        **dict.fromkeys(("weight", "picture_weights")),
    )


def compose_command(options: argparse.Namespace) -> None:
    check_new(options.output)
    concepts = training_concepts(options)
    places = backgrounds_of(load_folder(options.backgrounds, ""))
    made = compose(concepts, places, options.count, options.resolution, options.seed)
    options.output.mkdir(parents=True)
    for number, one in enumerate(made.pictures):
        picture = one.open()
        for ending, image in ((".png", picture.image), (".mask.png", picture.mask)):
            if image:
                file = options.output / f"{number:04}{ending}"
                write_atomically(file, partial(image.save, format="PNG"))
        write_text_atomically(options.output / f"{number:04}.txt", one.caption)
    print("\n".join(composed_words(concepts, made)))
    print(f"They are in {options.output}: give it to train --images with the first trigger word.")
