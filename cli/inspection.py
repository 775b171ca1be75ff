"""`custom-diffusion inspect`, `custom-diffusion list` and `custom-diffusion compare`"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..concept.concept import Concept
from ..concept.errors import ConceptFileError
from ..concept.fit import Fit, fit_to
from ..concept.layers import FAMILIES
from ..concept.plain import json_text
from ..formats.base import BaseModel
from ..formats.content import ENDINGS
from ..formats.importing import open_concept
from ..inspection.any_card import read_any_card
from ..inspection.card import ConceptCard, read_card
from ..inspection.library import ORDERS, SORTS, Listing, list_concepts
from ..inspection.report import aligned, inspect_concept
from ..inspection.weight_change import changes_between
from .models import base_model
from .output import check_new


def add_to(commands: Any) -> None:
    look = commands.add_parser(
        "inspect",
        help="what a concept file holds",
        example="inspect cat.safetensors",
    )
    look.add_argument("file", type=Path)
    look.add_argument("--layers", action="store_true", help="with a line for each layer")
    look.add_argument("--base", help="a model: say whether the concept fits it")
    look.add_argument("--json", action="store_true", help="all of it, for a program")
    look.set_defaults(command=inspect_command)

    many = commands.add_parser(
        "list",
        help="the concept files of a folder, and other tools' files",
        example="list models/custom_diffusion",
    )
    many.add_argument("folder", type=Path)
    many.add_argument("--search", default="", metavar="TEXT", help="in file names and prompts")
    many.add_argument("--base", default="", choices=FAMILIES, help="family of the base model")
    many.add_argument("--sort", default="name", choices=SORTS, help="by what")
    many.add_argument("--order", default="", choices=ORDERS, help="default: as suits --sort")
    many.add_argument("--json", action="store_true", help="for a program")
    many.set_defaults(command=list_command)

    change = commands.add_parser(
        "compare",
        help="how much each kind of layer changed between two models",
        description="Says how far the weights of two UNets are apart, by kind of layer: what a "
        "training of the whole UNet changed, or in what two checkpoints differ.",
        example="compare v1-5.safetensors my-cat.unet.safetensors --plot change.png",
    )
    change.add_argument("before", type=Path, help=".safetensors: a checkpoint, or a UNet alone")
    change.add_argument("after", type=Path)
    change.add_argument("--plot", type=Path, metavar="PICTURE", help="save it as a plot too")
    change.add_argument("--layers", action="store_true", help="a line for each tensor too")
    change.set_defaults(command=compare_command)


def inspect_command(options: argparse.Namespace) -> None:
    base = base_model(options.base) if options.base else None
    opened = open_concept(options.file, base)
    fit = _fit(opened.concept, base) if base else None
    created = "" if opened.foreign else read_card(options.file).created
    found = inspect_concept(opened.concept, options.file, created=created, fit=fit)
    print(json_text(found.as_json()) if options.json else found.text(layers=options.layers))


def compare_command(options: argparse.Namespace) -> None:
    if options.plot:
        check_new(options.plot)
    found = changes_between(options.before, options.after)
    print("\n".join([*found.summary(), *aligned(found.table())]))
    if options.layers:
        head = ("tensor", "kind", "change")
        lines = [(one.name, one.kind, f"{one.change:.3%}") for one in found.changes]
        print("\n".join(aligned([head, *lines])))
    if options.plot:
        found.plot().save(options.plot)
        print(f"saved {options.plot}")


def list_command(options: argparse.Namespace) -> None:
    folder: Path = options.folder
    if not os.path.isdir(folder):
        raise ConceptFileError(f"There is no folder {folder}. Give one that holds concept files.")
    files = [path for path in folder.rglob("*") if path.suffix in ENDINGS]
    names = [path.relative_to(folder).as_posix() for path in files]
    listing = list_concepts(
        names,
        lambda name: read_any_card(folder / name),
        search=options.search,
        base=options.base,
        sort=options.sort,
        order=options.order,
    )
    print(json_text(listing.as_json()) if options.json else "\n".join(_lines(listing)))


def _fit(concept: Concept, base: BaseModel) -> Fit:
    shapes = {layer: tuple(weight.shape) for layer, weight in base.weights.items()}
    return fit_to(concept, base.family, shapes, base.hash)


def _lines(listing: Listing) -> list[str]:
    head = ("name", "prompts", "base", "MB", "date", "made by")
    rows = [_cells(name, card) for name, card in listing.cards.items()]
    found = aligned([head, *rows]) if rows else ["no concept found"]
    return [*found, *(f"cannot be read: {why}" for why in listing.unreadable.values())]


def _cells(name: str, card: ConceptCard) -> tuple[str, ...]:
    steps = f", {card.steps} steps" if card.steps else ""
    size, date = f"{card.megabytes:.2f}", card.created[:10]
    made_by = f"another tool ({card.other})" if card.other else f"{card.method}{steps}"
    return name, ", ".join(card.prompts), card.base, size, date, made_by
