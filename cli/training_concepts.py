"""What a training of the command teaches: pictures and words, one of each for each concept."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..concept.errors import ConfigError
from ..concept.prompts import KINDS
from ..trainer.data.folders import load_folder
from ..trainer.data.training_concept import TrainingConcept, instance_caption
from ..trainer.data.weights import with_weights
from ..trainer.data.wording import with_trigger


def add_subject_options(teach: argparse.ArgumentParser) -> None:
    """Pictures and words of what is taught, one of each for each concept."""
    teach.add_argument(
        "--images",
        type=Path,
        nargs="+",
        required=True,
        metavar="FOLDER",
        help="4 to 20 pictures; next to cat1.jpg, cat1.txt is its caption and cat1.mask.png its "
        "mask (only white areas are learnt)",
    )
    teach.add_argument(
        "--class-noun",
        nargs="+",
        required=True,
        metavar="WORD",
        help="the everyday word for the subject: cat",
    )
    teach.add_argument(
        "--token",
        nargs="+",
        metavar="WORD",
        help="its trigger word in angle brackets, default <new1>; '' teaches the class noun itself",
    )


def add_concept_options(teach: argparse.ArgumentParser) -> None:
    """What else may be said of each concept."""
    teach.add_argument(
        "--initializer",
        nargs="+",
        metavar="WORD",
        help="a common word that the trigger word starts from; default: a rare one (the paper)",
    )
    teach.add_argument(
        "--regularization",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="about 200 ordinary pictures of the class; usually you need none",
    )
    teach.add_argument(
        "--start",
        type=Path,
        metavar="CONCEPT",
        help="a concept to extend: the same trigger word is trained further, another one is added",
    )
    teach.add_argument(
        "--kind",
        nargs="+",
        choices=KINDS,
        help="what the pictures have in common: a thing (default), or a style, whose class noun is "
        "art; one for all, or one for each folder",
    )
    teach.add_argument(
        "--weight",
        type=float,
        nargs="+",
        metavar="NUMBER",
        help="how much each concept counts beside the others; default: 1 each",
    )
    teach.add_argument(
        "--picture-weights",
        nargs="+",
        metavar="WEIGHTS",
        help="how much each picture of a folder counts, in quotes: one number per picture, or "
        "'cat1.jpg: 2, cat3.jpg: 0'; one text for each folder, '' where all count alike",
    )
    teach.add_argument(
        "--style", dest="kind", action="store_const", const=["style"], help="short for --kind style"
    )


def training_concepts(options: argparse.Namespace) -> list[TrainingConcept]:
    """One for each folder of pictures."""
    count = len(options.images)
    tokens = options.token or [f"<new{number}>" for number in range(1, count + 1)]
    initializers = options.initializer or [""] * count
    kinds = options.kind or ["thing"]
    kinds = kinds * count if len(kinds) == 1 else kinds
    regularizations = options.regularization or [None] * count
    weights = options.weight or [1.0] * count
    picture_weights = options.picture_weights or [""] * count
    for name, values in (
        ("class nouns", options.class_noun),
        ("trigger words", tokens),
        ("initializers", initializers),
        ("regularization folders", regularizations),
        ("kinds", kinds),
        ("weights", weights),
        ("picture weights", picture_weights),
    ):
        if len(values) != count:
            raise ConfigError(
                f"{len(values)} {name} were given for {count} folders of pictures. Give one for "
                f"each."
            )
    return [
        TrainingConcept(
            images=with_trigger(
                with_weights(
                    load_folder(folder, instance_caption(token, noun, KINDS[kind])), written
                ),
                token,
                noun,
            ),
            class_noun=noun,
            token=token,
            initializer=initializer,
            regularization=load_folder(others, instance_caption("", noun, KINDS[kind]))
            if others
            else (),
            template=KINDS[kind],
            weight=weight,
        )
        for folder, noun, token, initializer, others, kind, weight, written in zip(
            options.images,
            options.class_noun,
            tokens,
            initializers,
            regularizations,
            kinds,
            weights,
            picture_weights,
            strict=True,
        )
    ]
