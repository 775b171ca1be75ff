"""Does the loss on pictures kept back find a better step than the last one, and than the lowest
training loss? `python -m custom_diffusion.miniature.which_step`; docs/fidelity.md has the table.

A training that is too long, scored every so many steps. Concept n is the first of pair n.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..concept.concept import Concept
from ..host.diffusers.lending import borrowed_models
from ..trainer.events import CheckpointDue, Event, StepDone
from ..trainer.loop import train
from ..trainer.prepare import prepare
from ..trainer.validation import best_step
from .cells import markdown_table, options, run_command
from .judge import image_alignment, text_alignment
from .laboratory import Laboratory, Subject, evaluation_prompts, pair_of_subjects
from .model import CONFIG

EVERY_STEPS, STEPS, KEPT_BACK = 50, 600, 2
TABLE = "which step"


@dataclass(frozen=True)
class StepScore:
    """Of the step that a rule chooses."""

    step: float
    text_alignment: float
    image_alignment: float

    @property
    def both(self) -> float:
        return (self.text_alignment + self.image_alignment) / 2


Row = tuple[str, str, StepScore]


def run_cell(number: int, seed: int) -> list[Row]:
    """What each rule chooses for concept `number`, trained with this seed."""
    lab = Laboratory(pictures_per_prompt=2)
    one, _ = pair_of_subjects(number, seed)
    concepts, losses, validation = _taught(lab, one, seed)
    scores = {step: _score(lab, one, concept, step, seed) for step, concept in concepts.items()}
    by_loss = {step: statistics.fmean(losses[step - EVERY_STEPS : step]) for step in scores}
    chosen = {
        "the last": STEPS,
        "lowest training loss": best_step(by_loss),
        "lowest validation loss": best_step(validation),
        "best of all, by the judge": max(scores, key=lambda step: scores[step].both),
    }
    return [(TABLE, rule, scores[step]) for rule, step in chosen.items()]


def _taught(
    lab: Laboratory, one: Subject, seed: int
) -> tuple[Mapping[int, Concept], list[float], Mapping[int, float]]:
    """What was learnt at each measured step, all losses, and those on what was kept back."""
    config = replace(
        CONFIG,
        seed=seed,
        steps=STEPS,
        validation_pictures=KEPT_BACK,
        validation_every_steps=EVERY_STEPS,
        early_stopping="off",
    )
    concepts: dict[int, Concept] = {}
    losses: list[float] = []
    validation: dict[int, float] = {}

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            losses.append(event.loss)
            if event.validation is not None:
                validation[event.step] = event.validation
        elif isinstance(event, CheckpointDue) and event.concept:
            concepts[event.checkpoint.step] = event.concept

    with borrowed_models(lab.pipeline) as models:
        bank = prepare(one.training, config, models.latent_encoder, models.text_encoder)
        train(
            config,
            [one.training],
            [bank],
            models.denoiser,
            models.text_encoder,
            checkpoint_every_steps=EVERY_STEPS,
            on_event=listen,
        )
    return concepts, losses, validation


def _score(lab: Laboratory, one: Subject, concept: Concept, step: int, seed: int) -> StepScore:
    prompts, facts = evaluation_prompts([one], lab.pictures_per_prompt)
    seen = lab.recognizer.look(lab.draw(prompts, None, seed, routed=[concept]))
    return StepScore(
        step=step,
        text_alignment=float(text_alignment(seen, facts).mean()),
        image_alignment=float(image_alignment(seen, one.look).mean()),
    )


def main() -> None:
    rows = run_command(options(__doc__, concept_seed=0, seeds=1), run_cell, StepScore)
    columns = {
        "step": ("step", 0),
        "text alignment": ("text_alignment", 3),
        "image alignment": ("image_alignment", 3),
    }
    print(markdown_table(TABLE, [(rule, score) for _, rule, score in rows], columns))


if __name__ == "__main__":
    main()
