"""Does the overlap of two words' attention tell that their concepts mix?

`python -m custom_diffusion.miniature.overlap` teaches pairs, draws both in one picture, routed and
in the weights as a plain sum, and sets the overlap of the words beside what the judge sees.
docs/attention.md has the result.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..attention.maps import overlap
from ..composition.routing import Route
from ..concept.concept import Concept
from ..host.diffusers.attention import watched_words, watching
from ..host.diffusers.lending import text_encoder
from ..host.diffusers.sampling import sample
from .cells import options, run_command
from .judge import bleeds, both_present
from .laboratory import Laboratory, Subject, added, evaluation_prompts, pair_of_subjects
from .model import CONFIG, GUIDANCE, PICTURE_EDGE, SAMPLING_STEPS

_PARTS = {"whole": (0.0, 1.0), "first third": (0.0, 1 / 3)}


@dataclass(frozen=True)
class Mixed:
    """One picture, or the mean of a pair's."""

    whole: float
    """Overlap over all steps"""
    first_third: float
    both_present: float
    bleed: float


def run_cell(number: int, seed: int) -> list[tuple[str, str, Mixed]]:
    """Every picture of pair `number` with one training seed."""
    lab = Laboratory()
    pair = pair_of_subjects(number, seed)
    apart = [lab.teach([one], replace(CONFIG, seed=seed)) for one in pair]
    rows = [(f"{number}", "routed", one) for one in _pictures(lab, pair, seed, routed=apart)]
    summed = added(apart)
    return rows + [(f"{number}", "added", one) for one in _pictures(lab, pair, seed, summed)]


def _pictures(
    lab: Laboratory,
    pair: Sequence[Subject],
    seed: int,
    concept: Concept | None = None,
    routed: Sequence[Concept] = (),
) -> Iterator[Mixed]:
    encoder = text_encoder(lab.pipeline)
    for one in [concept] if concept else routed:
        encoder = encoder.with_tokens(one.embeddings())
    repeats = lab.pictures_per_prompt
    prompts, _ = evaluation_prompts(pair, 1)
    for number, prompt in enumerate(prompts):
        words = watched_words(encoder, prompt, [one.words for one in pair])
        first = 1000 * seed + repeats * number
        with watching(lab.pipeline, words) as recorder:
            images = sample(
                lab.pipeline,
                [prompt] * repeats,
                concept,
                routes=[Route(one) for one in routed],
                resolution=PICTURE_EDGE,
                seeds=range(first, first + repeats),
                steps=SAMPLING_STEPS,
                guidance=GUIDANCE,
            )
        seen = lab.recognizer.look(images.permute(0, 3, 1, 2))
        looks = [one.look for one in pair]
        maps = [recorder.maps().between(*part) for part in _PARTS.values()]
        for i, (both, bleed) in enumerate(
            zip(both_present(seen, looks), bleeds(seen, looks), strict=True)
        ):
            whole, early = (overlap(*of[i]) for of in maps)
            yield Mixed(whole, early, float(both), float(bleed))


def area(scores: Sequence[float], wrong: Sequence[bool]) -> float:
    """The chance that of a wrong and a right picture the wrong one has the higher score."""
    bad, good = (
        torch.tensor([s for s, w in zip(scores, wrong, strict=True) if w is which])
        for which in (True, False)
    )
    higher = (bad[:, None] > good).float() + 0.5 * (bad[:, None] == good).float()
    return float(higher.mean())


def main() -> None:
    rows = run_command(options(__doc__, concept_seed=320, seeds=1), run_cell, Mixed)
    for method in ("routed", "added"):
        ours = [(pair, one) for pair, name, one in rows if name == method]
        wrong = [one.bleed > 0 or not one.both_present for _, one in ours]
        print(f"{method}: {len(ours)} pictures, {sum(wrong)} wrong")
        for part in ("whole", "first_third"):
            values = [getattr(one, part) for _, one in ours]
            pairs: dict[str, list[tuple[float, float]]] = {}
            for (pair, _), value, bad in zip(ours, values, wrong, strict=True):
                pairs.setdefault(pair, []).append((value, float(bad)))
            means = [[statistics.mean(c) for c in zip(*of, strict=True)] for of in pairs.values()]
            over_pairs = statistics.correlation(*zip(*means, strict=True))
            print(
                f"  {part}: mean {statistics.mean(values):.2f}, of a wrong and a right picture "
                f"the wrong one is higher in {area(values, wrong):.0%}, "
                f"correlation over {len(means)} pairs {over_pairs:.2f}"
            )


if __name__ == "__main__":
    main()
