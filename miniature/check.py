"""Can the judge be trusted, and does the model follow its prompts?

`python -m custom_diffusion.miniature.check` answers both with a table each. The judge is shown
drawn pictures of which the truth is known, and the same with one thing wrong. The model is given
captions that it was not trained on.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from .concepts import concept_look
from .drawing import draw
from .judge import Facts, bleeds, both_present, follows, image_alignment, text_alignment
from .laboratory import Laboratory
from .model import LATENT_EDGE
from .recognizer import Recognizer, load_recognizer
from .world import (
    BACKGROUNDS,
    MARKS,
    PATTERNS,
    SHAPES,
    Look,
    Scene,
    common_color,
    held_out,
    random_caption,
    random_scene,
)

Change = Callable[[Look, random.Random], Look]
CHANGES: dict[str, Change] = {
    "the concept": lambda look, rng: look,
    "another mark": lambda look, rng: replace(look, mark=_other(MARKS, look.mark, rng)),
    "another pattern": lambda look, rng: replace(look, pattern=_other(PATTERNS, look.pattern, rng)),
    "another main colour": lambda look, rng: replace(look, color=common_color(rng)),
    "colours exchanged": lambda look, rng: replace(
        look, color=look.second_color, second_color=look.color
    ),
    "other colours": lambda look, rng: replace(
        look, color=common_color(rng), second_color=common_color(rng)
    ),
    "another shape": lambda look, rng: replace(look, shape=_other(SHAPES, look.shape, rng)),
}


def concept_table(
    recognizer: Recognizer, concepts: int = 20, pictures: int = 20
) -> dict[str, float]:
    """Mean image alignment of drawn pictures of concepts, and of almost the concepts."""
    rng = random.Random("concept table")
    table = {}
    for name, change in CHANGES.items():
        scores = []
        for seed in range(concepts):
            look = concept_look(seed)
            scenes = [random_scene(rng, [change(look, rng)]) for _ in range(pictures)]
            scores.append(image_alignment(recognizer.look(draw(scenes, LATENT_EDGE)), look))
        table[name] = float(torch.cat(scores).mean())
    empty = [replace(random_scene(rng), objects=()) for _ in range(pictures)]
    seen = recognizer.look(draw(empty, LATENT_EDGE))
    table["no object"] = float(image_alignment(seen, concept_look(0)).mean())
    return table


def pair_table(recognizer: Recognizer, pairs: int = 10, pictures: int = 40) -> dict[str, Tensor]:
    """Rates of both present and of bleed: of true pairs, and of pairs with something wrong."""
    rng = random.Random("pair table")
    rates: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for pair in range(pairs):
        one, two = concept_look(2 * pair), concept_look(2 * pair + 1)
        shown = {
            "both concepts": (one, two),
            "one is any object of its class": (
                one,
                replace(two, color=common_color(rng), second_color=common_color(rng), mark="none"),
            ),
            "one is missing": (one,),
            "one wears a colour of the other": (one, replace(two, color=one.color)),
            "looks exchanged": (replace(one, shape=two.shape), replace(two, shape=one.shape)),
        }
        for name, looks in shown.items():
            scenes = [random_scene(rng, looks) for _ in range(pictures)]
            seen = recognizer.look(draw(scenes, LATENT_EDGE))
            rates.setdefault(name, []).append(
                (both_present(seen, (one, two)).float(), bleeds(seen, (one, two)).float())
            )
    return {
        name: torch.tensor([[a.mean(), b.mean()] for a, b in parts]).mean(0)
        for name, parts in rates.items()
    }


def caption_table(recognizer: Recognizer, pictures: int = 400) -> dict[str, tuple[float, float]]:
    """Text alignment and share of captions followed: of true pictures, and with one thing wrong."""
    rng = random.Random("caption table")
    pairs = [next(named_captions(rng, 1 + i % 2)) for i in range(pictures)]
    facts = [Facts.of(caption) for _, caption in pairs]
    table = {}
    for name, change in _SCENE_CHANGES.items():
        seen = recognizer.look(draw([change(scene, rng) for scene, _ in pairs], LATENT_EDGE))
        followed = follows(seen, facts).float().mean()
        table[name] = float(text_alignment(seen, facts).mean()), float(followed)
    return table


def prompt_following(
    laboratory: Laboratory, objects: int, count: int = 200, seed: int = 0
) -> float:
    """Share of captions with so many objects, none of them trained on, that the model follows."""
    rng = random.Random(f"unseen {objects} {seed}")
    unseen = (caption for _, caption in named_captions(rng, objects) if held_out(caption))
    captions = list(islice(unseen, count))
    pictures = laboratory.draw(captions, None, seed)
    seen = laboratory.recognizer.look(pictures)
    return float(follows(seen, [Facts.of(caption) for caption in captions]).float().mean())


def named_captions(rng: random.Random, objects: int) -> Iterator[tuple[Scene, str]]:
    """Scenes with captions that name the colours of every object."""
    while True:
        scene = random_scene(rng)
        caption = random_caption(scene, rng)
        if len(scene.objects) == objects and all(said.color for said in Facts.of(caption).objects):
            yield scene, caption


def _change_first(change: Change) -> Callable[[Scene, random.Random], Scene]:
    def changed(scene: Scene, rng: random.Random) -> Scene:
        first, *rest = scene.objects
        return replace(scene, objects=(replace(first, look=change(first.look, rng)), *rest))

    return changed


_SCENE_CHANGES: dict[str, Callable[[Scene, random.Random], Scene]] = {
    "as the caption says": lambda scene, rng: scene,
    "another colour": _change_first(
        lambda look, rng: replace(look, color=(look.color[1], look.color[2], look.color[0]))
    ),
    "another shape": _change_first(CHANGES["another shape"]),
    "the last object missing": lambda scene, rng: replace(scene, objects=scene.objects[:-1]),
    "another background": lambda scene, rng: replace(
        scene, background=_other(tuple(BACKGROUNDS), scene.background, rng)
    ),
}


def _other(all_: tuple[str, ...], one: str, rng: random.Random) -> str:
    return rng.choice([item for item in all_ if item != one])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the captions")
    options = parser.parse_args()
    recognizer = load_recognizer()
    print("| drawn | image alignment |\n|---|---|")
    for name, score in concept_table(recognizer).items():
        print(f"| {name} | {score:.2f} |")
    print("\n| drawn for a caption | text alignment | followed |\n|---|---|---|")
    for name, (score, rate) in caption_table(recognizer).items():
        print(f"| {name} | {score:.2f} | {100 * rate:.0f} % |")
    print("\n| drawn for a pair | both present | bleed |\n|---|---|---|")
    for name, rates in pair_table(recognizer).items():
        print(f"| {name} | {100 * rates[0]:.0f} % | {100 * rates[1]:.0f} % |")
    laboratory = Laboratory()
    for objects in (1, 2):
        rate = prompt_following(laboratory, objects, seed=options.seed)
        print(f"\ncaptions with {objects} objects that the model follows: {100 * rate:.1f} %")


if __name__ == "__main__":
    main()
