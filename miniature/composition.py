"""Every way of putting two concepts into one picture: `python -m
custom_diffusion.miniature.composition`.

Both concepts of a pair are taught apart, or together, and drawn with the same prompts and seeds in
each way; pairs have different shapes, or one. docs/composition.md has the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..composition.isolation import ISOLATED_FROM
from ..composition.masks import box
from ..composition.regions import Region
from ..composition.routing import Route
from ..concept.concept import Concept
from ..concept.file import read_concept, write_concept
from ..host.diffusers.sampling import sample
from ..merge.merging import merge_concepts
from ..pictures.tensors import to_chw
from .by_place import look_at_halves
from .cells import Row, markdown_table, options, run_command
from .concepts import training_concept
from .judge import Facts, bleeds, both_present, image_alignment, text_alignment
from .laboratory import (
    PICTURES_A_SEED,
    Laboratory,
    Subject,
    added,
    evaluation_prompts,
    pair_of_subjects,
    subject_of,
)
from .model import CONFIG, GUIDANCE, PICTURE_EDGE, SAMPLING_STEPS
from .world import world_captions

_CLASS_PICTURES = 16
"""For the drift, for each picture of a prompt"""
SEG_MIX = 0.3
TITLES = ("different shapes", "one shape")
COLUMNS = {
    "both present": ("both_present", 2),
    "bleed": ("bleed", 2),
    "weaker concept": ("weaker", 2),
    "text": ("text_alignment", 2),
    "drift": ("drift", 0),
    "evaluations": ("evaluations", 0),
    "seconds": ("seconds", 2),
}


@dataclass(frozen=True)
class Composed:
    """Means over the pictures of one pair."""

    both_present: float
    bleed: float
    weaker: float
    """Image alignment of whichever concept of a picture is less like itself"""
    text_alignment: float
    drift: float
    """Of the bare classes"""
    evaluations: float
    """Of the UNet, a picture"""
    seconds: float
    """A picture, on one thread"""


@dataclass(frozen=True)
class Way:
    """What `sample` is given to draw a pair."""

    concept: Concept | None = None
    routed: Sequence[Concept] = ()
    regions: Sequence[Sequence[Region]] = ()
    isolated_from: float | None = None


@dataclass(frozen=True)
class Otherwise:
    """What the same pair learns otherwise."""

    joint: Concept
    mixed: Concept
    """Joint with Seg-Mix; its pictures have masks."""
    values_only: Sequence[Concept]
    """Apart"""


Ways = Mapping[str, Callable[[Sequence[str]], Way]]
"""What a way of composing is called, and how prompts are drawn"""


def ways(apart: Sequence[Concept], otherwise: Otherwise | None, lab: Laboratory) -> Ways:
    """Those that this module compares; a new one is a line here."""
    found: dict[str, Callable[[Sequence[str]], Way]] = {
        "added": lambda prompts: Way(added(apart)),
        "merged": lambda prompts: Way(
            merge_concepts(apart, lab.encoder, captions=world_captions())[0]
        ),
        "routed": lambda prompts: Way(routed=apart),
        "regions, found": lambda prompts: Way(regions=regions_of(prompts, apart, False)),
        "regions, given": lambda prompts: Way(regions=regions_of(prompts, apart, True)),
        "isolated, found": lambda prompts: Way(
            regions=regions_of(prompts, apart, False), isolated_from=ISOLATED_FROM
        ),
        "isolated, given": lambda prompts: Way(
            regions=regions_of(prompts, apart, True), isolated_from=ISOLATED_FROM
        ),
    }
    if otherwise:
        found["joint, routed"] = lambda prompts: Way(routed=[otherwise.joint])
        found["joint with Seg-Mix, routed"] = lambda prompts: Way(routed=[otherwise.mixed])
        found["values only, routed"] = lambda prompts: Way(routed=otherwise.values_only)
    return found


def regions_of(
    prompts: Sequence[str], concepts: Sequence[Concept], given: bool
) -> list[list[Region]]:
    """The halves of each picture, as its prompt names them from the left or from the top, or places
    to be found.
    """
    routes = [Route(concept) for concept in concepts]
    listed = []
    for prompt in prompts:
        first, second = (prompt.index(concept.tokens[0].name) for concept in concepts)
        halves = _halves("above" in prompt)
        masks = halves if first < second else halves[::-1]
        listed.append(
            [
                Region("", mask if given else None, route)
                for mask, route in zip(masks, routes, strict=True)
            ]
        )
    return listed


def _halves(above: bool) -> tuple[Tensor, Tensor]:
    if above:
        return box(0, 0, 1, 0.5), box(0, 0.5, 1, 0.5)
    return box(0, 0, 0.5, 1), box(0.5, 0, 0.5, 1)


def run_cell(given: argparse.Namespace, number: int, seed: int) -> list[Row[Composed]]:
    """Every way on pair `number` with one training seed."""
    lab = Laboratory(given.pictures, _CLASS_PICTURES * given.pictures)
    return list(_cell(Taught(lab, given.folder, number, seed), given.joint, given.shapes))


def _cell(taught: Taught, with_otherwise: bool, titles: Sequence[str]) -> Iterator[Row[Composed]]:
    lab, seed = taught.lab, taught.seed
    for title in titles:
        one_shape = title == TITLES[1]
        pair = taught.pair(one_shape)
        apart = taught.apart(one_shape)
        otherwise = taught.otherwise() if with_otherwise and not one_shape else None
        drift, _ = lab.class_drift(pair, None, seed)  # where nothing acts at the bare class
        for name, way in ways(apart, otherwise, lab).items():
            yield title, name, judge(lab, pair, seed, way, drift, one_shape)


@dataclass(frozen=True)
class Taught:
    """Concepts of one pair and seed; kept in a folder, if there is one, for another run."""

    lab: Laboratory
    folder: Path | None
    number: int
    seed: int

    def pair(self, one_shape: bool = False) -> tuple[Subject, Subject]:
        one, two = pair_of_subjects(self.number, self.seed)
        if one_shape:
            two = subject_of(replace(two.look, shape=one.look.shape), two.token, self.seed)
        return one, two

    def apart(self, one_shape: bool) -> list[Concept]:
        first, second = self.pair(one_shape)
        return [
            self._kept("first", [first]),
            self._kept("alike" if one_shape else "second", [second]),
        ]

    def otherwise(self) -> Otherwise:
        pair, steps = self.pair(), 2 * CONFIG.steps
        masked = [
            replace(one, training=training_concept(one.look, one.token, self.seed, masked=True))
            for one in pair
        ]
        return Otherwise(
            self._kept("joint", pair, steps=steps),
            self._kept("mixed", masked, steps=steps, seg_mix=SEG_MIX),
            [
                self._kept(f"{name}-values", [one], method="values only")
                for name, one in zip(("first", "second"), pair, strict=True)
            ],
        )

    def _kept(self, name: str, subjects: Sequence[Subject], **changes: Any) -> Concept:
        file = self.folder and self.folder / f"{self.number}-{self.seed}-{name}.safetensors"
        if file and file.is_file():
            return read_concept(file)
        concept = self.lab.teach(subjects, replace(CONFIG, seed=self.seed, **changes))
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_concept(concept, file, torch.float32)
        return concept


def judge(
    lab: Laboratory,
    pair: Sequence[Subject],
    seed: int,
    way: Callable[[Sequence[str]], Way],
    bare_drift: float,
    one_shape: bool,
) -> Composed:
    """Pictures of both, with the same seeds whoever draws."""
    prompts, facts = evaluation_prompts(pair, lab.pictures_per_prompt)
    drawn_by = way(prompts)
    pictures, evaluations, seconds = draw(lab, prompts, drawn_by, seed)
    looks = [one.look for one in pair]
    drift = bare_drift
    if drawn_by.concept is not None:  # in the weights it may act at any word
        drift, _ = lab.class_drift(pair, drawn_by.concept, seed)
    together, mixed, weaker, text = _seen(lab, pictures, facts, looks, one_shape)
    return Composed(
        both_present=float(together.float().mean()),
        bleed=float(mixed.float().mean()),
        weaker=float(weaker.mean()),
        text_alignment=float(text.mean()),
        drift=drift,
        evaluations=evaluations,
        seconds=seconds,
    )


def _seen(
    lab: Laboratory, pictures: Tensor, facts: Sequence[Facts], looks: Sequence[Any], one_shape: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each picture (b,): both present, bleed, the weaker one's alignment, text alignment."""
    if one_shape:
        halves = look_at_halves(lab.recognizer, pictures, facts)
        weaker = halves.alignments(looks)[0].amin(1)
        together, mixed = halves.both_present(looks), halves.bleeds(looks)
        return together, mixed, weaker, halves.text_alignment(facts)
    seen = lab.recognizer.look(pictures)
    weaker = torch.stack([image_alignment(seen, look) for look in looks]).amin(0)
    return both_present(seen, looks), bleeds(seen, looks), weaker, text_alignment(seen, facts)


def draw(
    lab: Laboratory, prompts: Sequence[str], way: Way, seed: int
) -> tuple[Tensor, float, float]:
    """Pictures (b, 3, h, w), evaluations of the UNet and seconds a picture."""
    rows = 0

    def count(module: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        nonlocal rows
        rows += len(args[0])

    handle = lab.pipeline.unet.register_forward_pre_hook(count, with_kwargs=True)
    began = time.perf_counter()
    try:
        images = sample(
            lab.pipeline,
            prompts,
            way.concept,
            routes=[Route(one) for one in way.routed],
            regions=way.regions,
            isolated_from=way.isolated_from,
            resolution=PICTURE_EDGE,
            seeds=range(PICTURES_A_SEED * seed, PICTURES_A_SEED * seed + len(prompts)),
            steps=SAMPLING_STEPS,
            guidance=GUIDANCE,
        )
    finally:
        handle.remove()
    seconds = time.perf_counter() - began
    return to_chw(images), rows / len(prompts), seconds / len(prompts)


def main() -> None:
    more = argparse.ArgumentParser(add_help=False)
    more.add_argument("--pairs", type=int, dest="concepts", help="how many pairs")
    more.add_argument("--folder", type=Path, help="keep what is taught here, for another run")
    more.add_argument("--joint", action="store_true", help="both taught together, and values only")
    more.add_argument("--shapes", nargs="+", choices=TITLES, default=TITLES)
    more.add_argument("--pictures", type=int, default=3, help="of each of eight prompts")
    given = options(__doc__, concept_seed=600, seeds=3, more=[more])
    rows = run_command(given, partial(run_cell, given), Composed)
    for title in given.shapes:
        print(markdown_table(title, [(n, s) for t, n, s in rows if t == title], COLUMNS))


if __name__ == "__main__":
    main()
