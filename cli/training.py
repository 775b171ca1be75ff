"""`custom-diffusion train`"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..concept.concept import Concept
from ..concept.errors import ConfigError
from ..concept.file import read_concept, size_of
from ..concept.prompts import DEFAULT_TEMPLATE, STYLE_TEMPLATE
from ..concept.text import TextEncoder
from ..merge.projection import project_on_own_words
from ..trainer.config import TrainConfig
from ..trainer.data.advice import advice
from ..trainer.data.folders import folder_advice, load_folder
from ..trainer.data.training_concept import TrainingConcept, instance_caption
from ..trainer.events import Event, Notice, StepDone
from ..trainer.jobs.fingerprint import training_fingerprint
from ..trainer.learning.network_file import fold_in, write_network
from ..trainer.loop import train
from ..trainer.methods import METHODS
from ..trainer.prepare import prepare
from ..trainer.start import check_start
from .models import DEFAULTS, add_model_options, captions_for, load, precision, recipe_for
from .output import check_new, progress, save, save_at_any_rate, stop_on_interrupt
from .parsing import named
from .settings import add_setting_options, chosen_settings
from .torchrun import Team, team
from .training_job import run_as_job

if TYPE_CHECKING:
    from ..host.diffusers.denoiser import DiffusersDenoiser


def add_to(commands: Any) -> None:
    teach = commands.add_parser(
        "train",
        help="teach concepts from folders of pictures",
        description="Teaches a concept, or several together into one file: then give as many "
        "class nouns and tokens as folders. The defaults are Stable Diffusion's; the miniature has "
        "its own steps, batch, rate and resolution.",
        example='train --model sd15 --images photos/cat --class-noun cat --token "<new1>" '
        "--output cat.safetensors",
    )
    add_model_options(teach)
    teach.add_argument(
        "--images", type=Path, nargs="+", required=True, help="folder of 4 to 20 pictures"
    )
    teach.add_argument(
        "--class-noun", nargs="+", required=True, help="everyday word for the subject: cat"
    )
    teach.add_argument(
        "--token", nargs="+", help="its new word, default <new1>; '' teaches the class noun itself"
    )
    teach.add_argument("--initializer", nargs="+", help="word the token starts from")
    teach.add_argument(
        "--regularization", type=Path, nargs="+", help="folder of ordinary class pictures"
    )
    teach.add_argument(
        "--start",
        type=Path,
        metavar="CONCEPT",
        help="go on from a concept: with its own token, or with another to learn one more",
    )
    teach.add_argument("--style", action="store_true", help="they are styles; class noun: art")
    teach.add_argument(
        "--method",
        type=named(METHODS),
        choices=METHODS,
        default=DEFAULTS.method,
        help="; ".join(f"{name}: {method.description}" for name, method in METHODS.items()),
    )
    add_setting_options(teach)
    teach.add_argument(
        "--jobs",
        type=Path,
        metavar="FOLDER",
        help="train as a job in this folder: checkpoints are written, Ctrl-C pauses, and the same "
        "command resumes where it was interrupted or killed",
    )
    teach.add_argument(
        "--whole",
        action="store_true",
        help="save all of the change, not only what it does at the concept's own words",
    )
    teach.add_argument(
        "--output", type=Path, default=Path("concept.safetensors"), help="where it is saved"
    )
    teach.set_defaults(command=train_command)


def train_command(options: argparse.Namespace) -> None:
    check_new(options.output)
    if METHODS[options.method].whole_network:
        check_new(_network_file(options.output))
    config = training_config(options)
    concepts = _training_concepts(options)
    start = read_concept(options.start) if options.start else None
    with team(options.device) as together:
        if together.leads:
            _show_advice(options, concepts)
        _train(options, config, concepts, start, together)


def _show_advice(options: argparse.Namespace, concepts: list[TrainingConcept]) -> None:
    """What the Concept node says of its pictures."""
    for folder in [*options.images, *(options.regularization or [])]:
        for sentence in folder_advice(folder):
            print(f"note: {folder}: {sentence}", file=sys.stderr)
    for concept in concepts:
        for sentence in advice(concept):
            print(f"note: {sentence}", file=sys.stderr)


def _train(
    options: argparse.Namespace,
    config: TrainConfig,
    concepts: list[TrainingConcept],
    start: Concept | None,
    together: Team,
) -> None:
    from ..host.diffusers.lending import borrowed_models

    pipeline = load(options.model, together.device, precision(options.precision, together.device))
    with borrowed_models(pipeline) as models:
        if config.text_encoder_on_cpu:
            models.text_encoder.to(torch.device("cpu"))
        else:
            models.text_encoder.to(models.denoiser.device, models.denoiser.dtype)
        if start:  # before the time that encoding takes
            check_start(start, models.denoiser, config)
        with tqdm(desc="encoding pictures", unit="view", disable=not together.leads) as bar:
            banks = [
                prepare(
                    one,
                    config,
                    models.latent_encoder,
                    models.text_encoder,
                    progress(bar),
                    start=start,
                )
                for one in concepts
            ]
        run = partial(
            train, config, concepts, banks, models.denoiser, models.text_encoder, start=start
        )
        if not together.leads:
            together.follow(run)
            return
        run = partial(together.train, run)
        finish = partial(_finished, options, models.denoiser, models.text_encoder)
        save_result = partial(_save, options, models.denoiser)
        if options.jobs:
            networks = (pipeline.unet, pipeline.vae)
            same = training_fingerprint(config, concepts, models.text_encoder, networks, start)
            fingerprint = f"{options.output} {same}"

            def keep(result: Concept) -> Path:
                save_result(finish(result), options.output)
                return options.output  # type: ignore[no-any-return]

            run_as_job(options.jobs, options.output.stem, config, fingerprint, run, keep)
            return
        with (
            tqdm(total=config.steps, desc="training", unit="step") as bar,
            stop_on_interrupt() as stopped,
        ):
            result = run(should_stop=stopped, on_event=lambda event: _show(event, bar))
        if result.provenance["steps"] == 0:
            print("stopped before the first step: nothing was learnt, nothing was saved")
            return
        save_at_any_rate(partial(save_result, finish(result)), options.output)


def training_config(options: argparse.Namespace) -> TrainConfig:
    """The model's and the method's recipe, but for what was given."""
    return replace(
        recipe_for(options.model, options.method),
        method=options.method,
        preview_every_steps=0,
        **chosen_settings(options),
    )


def _finished(
    options: argparse.Namespace,
    denoiser: DiffusersDenoiser,
    encoder: TextEncoder,
    result: Concept,
) -> Concept:
    """What is saved of the result, once: the rest of it is in the network afterwards."""
    if METHODS[options.method].whole_network:
        result = fold_in(denoiser, result)
    if result.scope == "own words" and not options.whole:
        result, _ = project_on_own_words(result, encoder, captions=captions_for(options.model))
    return result


def _save(
    options: argparse.Namespace, denoiser: DiffusersDenoiser, result: Concept, output: Path
) -> None:
    if METHODS[options.method].whole_network:
        network = _network_file(output)
        write_network(denoiser.network, network)
        print(f"saved {network} ({size_of(network)}): the whole UNet")
    save(result, output)


def _network_file(output: Path) -> Path:
    return output.with_name(f"{output.stem}-unet.safetensors")


def _training_concepts(options: argparse.Namespace) -> list[TrainingConcept]:
    """One for each folder of pictures."""
    count = len(options.images)
    tokens = options.token or [f"<new{number}>" for number in range(1, count + 1)]
    initializers = options.initializer or [""] * count
    regularizations = options.regularization or [None] * count
    for name, values in (
        ("class nouns", options.class_noun),
        ("tokens", tokens),
        ("initializers", initializers),
        ("regularization folders", regularizations),
    ):
        if len(values) != count:
            raise ConfigError(
                f"{len(values)} {name} were given for {count} folders of pictures. Give one for "
                f"each."
            )
    template = STYLE_TEMPLATE if options.style else DEFAULT_TEMPLATE
    return [
        TrainingConcept(
            images=load_folder(folder, instance_caption(token, noun, template)),
            class_noun=noun,
            token=token,
            initializer=initializer,
            regularization=load_folder(others, instance_caption("", noun, template))
            if others
            else (),
            template=template,
        )
        for folder, noun, token, initializer, others in zip(
            options.images, options.class_noun, tokens, initializers, regularizations, strict=True
        )
    ]


def _show(event: Event, bar: tqdm[None]) -> None:
    if isinstance(event, StepDone):
        bar.set_postfix(loss=f"{event.loss:.4f}", refresh=False)
        bar.update(event.step - bar.n)
        if event.validation is not None:
            bar.write(f"step {event.step}: validation loss {event.validation:.4f}")
    elif isinstance(event, Notice):
        bar.write(event.text())
