"""`custom-diffusion edit` and `custom-diffusion lock-keys`"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..concept.errors import MergeError
from ..concept.file import read_concept
from ..merge.editing import edit_again
from ..merge.edits import Edit, read_amounts, read_words
from ..merge.key_lock import lock_keys
from .merging import show_percent
from .models import base_model, captions_for, load
from .output import check_new, save


def add_to(commands: Any) -> None:
    edit = commands.add_parser(
        "edit",
        help="erase, weaken, replace or debias words of a model",
        description="Changes what words of a model mean, without training. The result is a "
        "concept file: apply it like any other, or with a strength between 0 and 1.",
        example="edit --model sd15.safetensors --erase 'square' --replace 'lorry=truck' "
        "--preserve 'circle, cross' --output edit.safetensors",
    )
    edit.add_argument("--model", required=True, help="the model whose words are edited")
    _add_edits(edit)
    edit.add_argument(
        "--preserve", default="", metavar="WORDS", help="words that stay exactly as they are"
    )
    edit.add_argument(
        "--softness",
        type=float,
        default=0.0,
        help="0 does exactly what is asked; above it all words give way a little",
    )
    edit.add_argument(
        "--captions",
        type=Path,
        help="ordinary captions, one a line, whose pictures must not change; default: ours",
    )
    edit.add_argument(
        "--no-captions",
        action="store_true",
        help="keep only --preserve, as Unified Concept Editing does",
    )
    edit.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="keeps what was computed of the captions, for the next edit",
    )
    edit.add_argument(
        "--output", type=Path, default=Path("edit.safetensors"), help="where it is saved"
    )
    edit.set_defaults(command=edit_command)
    lock = commands.add_parser(
        "lock-keys",
        help="let a concept's words look where its class noun looks",
        description="Sets the keys of a concept's words to those of its class noun. What it has "
        "learnt of values stays.",
        example="lock-keys cat.safetensors --model sd15.safetensors --output locked.safetensors",
    )
    lock.add_argument("concept", type=Path)
    lock.add_argument("--model", required=True, help="the model that it was trained on")
    lock.add_argument("--captions", type=Path, help="ordinary captions; default: ours")
    lock.add_argument("--cache", type=Path, metavar="FOLDER", help="as of edit")
    lock.add_argument(
        "--output", type=Path, default=Path("locked.safetensors"), help="where it is saved"
    )
    lock.set_defaults(command=lock_command)


def _add_edits(edit: argparse.ArgumentParser) -> None:
    edit.add_argument("--erase", action="append", default=[], metavar="WORDS", help="words to lose")
    edit.add_argument(
        "--moderate",
        action="append",
        default=[],
        metavar="WORD=SHARE",
        help="how much of a word's meaning goes, gore=0.5",
    )
    edit.add_argument(
        "--replace",
        action="append",
        default=[],
        metavar="WORD=WORD",
        help="a word, and what it means from now on",
    )
    edit.add_argument(
        "--debias",
        action="append",
        default=[],
        metavar="WORD=AMOUNTS",
        help="a class, and what to draw more often and less, 'doctor=woman:0.3,man:-0.3'",
    )
    edit.add_argument(
        "--earlier", type=Path, metavar="EDIT", help="an earlier edit of this model, to go on from"
    )
    edit.add_argument(
        "--restore",
        action="append",
        default=[],
        metavar="WORD=STRENGTH",
        help="a word of --earlier to give back; 1 gives it back exactly",
    )


def edit_command(options: argparse.Namespace) -> None:
    from ..host.diffusers.lending import text_encoder

    check_new(options.output)
    edits = _edits(options)
    restore = {word: _number(word, text) for word, text in map(_pair, options.restore)}
    earlier = read_concept(options.earlier) if options.earlier else None
    with tqdm(total=100, desc="editing", unit="%") as bar:
        concept, report = edit_again(
            earlier,
            base_model(options.model).weights,
            text_encoder(load(options.model)),
            edits,
            restore=restore,
            preserved=read_words(options.preserve),
            softness=options.softness,
            captions=[] if options.no_captions else captions_for(options.model, options.captions),
            cache_folder=options.cache,
            on_progress=lambda fraction: show_percent(fraction, bar),
        )
    print(report.text())
    save(concept, options.output)


def lock_command(options: argparse.Namespace) -> None:
    from ..host.diffusers.lending import text_encoder

    check_new(options.output)
    concept = read_concept(options.concept)
    locked, report = lock_keys(
        concept,
        base_model(options.model).weights,
        text_encoder(load(options.model)),
        captions=captions_for(options.model, options.captions),
        cache_folder=options.cache,
    )
    print(*report.summary(), sep="\n")
    save(locked, options.output)


def _edits(options: argparse.Namespace) -> list[Edit]:
    return [
        *(Edit(word) for text in options.erase for word in read_words(text)),
        *(Edit(w, share=_number(w, text)) for w, text in map(_pair, options.moderate)),
        *(Edit(word, into) for word, into in map(_pair, options.replace)),
        *(Edit(w, attributes=read_amounts(text)) for w, text in map(_pair, options.debias)),
    ]


def _pair(text: str) -> tuple[str, str]:
    word, equals, value = (part.strip() for part in text.partition("="))
    if not (word and equals and value):
        raise MergeError(
            f"{text!r} has no '=' between a word and what follows. Write 'word=value'."
        )
    return word, value


def _number(word: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise MergeError(f"{text!r} is no number. Write '{word}=0.5', for example.") from error
