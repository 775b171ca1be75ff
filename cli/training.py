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
from ..concept.errors import ConceptFileError
from ..concept.file import read_concept, size_of, write_concept
from ..concept.text import TextEncoder
from ..diffusion.protocols import Denoiser
from ..merge.projection import project_on_own_words
from ..trainer.card import fit_card
from ..trainer.config import TrainConfig
from ..trainer.data.advice import advice
from ..trainer.data.folders import folder_advice
from ..trainer.data.training_concept import TrainingConcept
from ..trainer.events import Event, Notice, PreviewDrawn, StepDone
from ..trainer.jobs.fingerprint import training_fingerprint
from ..trainer.jobs.own_files import OwnFiles
from ..trainer.learning.network_file import fold_in, write_network
from ..trainer.methods import METHODS
from ..trainer.request import TrainingRequest
from ..trainer.teach import prepared
from .models import DEFAULTS, add_model_options, captions_for, load_chosen, recipe_for
from .output import check_new, progress, save, save_at_any_rate, say_saved, stop_on_interrupt
from .parsing import named
from .previews import Previews
from .settings import add_job_options, add_setting_options, chosen_settings, job_settings
from .torchrun import Team, team
from .training_concepts import add_concept_options, add_subject_options, training_concepts
from .training_job import is_of_a_job, run_as_job

_BAR_AFTER_S = 0.1
"""Not at once: what is wrong with the request is told without a bar before it"""

if TYPE_CHECKING:
    from ..host.diffusers.denoiser import DiffusersDenoiser


def add_to(commands: Any) -> None:
    teach = commands.add_parser(
        "train",
        help="teach concepts from folders of pictures",
        description="Teaches a concept from a folder of pictures, or several together in one file: "
        "then give one class noun and one trigger word for each folder. The defaults suit Stable "
        "Diffusion; the miniature has its own.",
        example="train --model sd15.safetensors --images photos/cat --class-noun cat "
        '--token "<new1>" --output cat.safetensors',
    )
    add_model_options(teach)
    add_subject_options(teach)
    add_concept_options(teach)
    teach.add_argument(
        "--method",
        type=named(METHODS),
        choices=METHODS,
        default=DEFAULTS.method,
        help="what is trained; take low-rank for SDXL. "
        + "; ".join(f"{name}: {method.description}" for name, method in METHODS.items()),
    )
    add_setting_options(teach)
    results = teach.add_argument_group("what it leaves")
    results.add_argument(
        "--jobs",
        type=Path,
        metavar="FOLDER",
        help="train as a job in this folder: progress is saved, Ctrl-C pauses, and the same "
        "command resumes, also after a crash",
    )
    add_job_options(results)
    results.add_argument(
        "--whole",
        action="store_true",
        help="save all of the change, not only what it does at the concept's own words",
    )
    results.add_argument(
        "--output", type=Path, default=Path("concept.safetensors"), help="where it is saved"
    )
    teach.set_defaults(command=train_command)


def train_command(options: argparse.Namespace) -> None:
    for output in _outputs(options):
        if not (options.jobs and is_of_a_job(options.jobs, output)):
            check_new(output)
    config = training_config(options)
    job_settings(options)  # refused before anything is loaded
    concepts = training_concepts(options)
    start = read_concept(options.start) if options.start else None
    request = TrainingRequest(config, concepts, start)
    with team(options.device) as together:
        if together.leads:
            _show_advice(options, concepts)
        _train(options, request, together)


def _show_advice(options: argparse.Namespace, concepts: list[TrainingConcept]) -> None:
    """What the Concept node says of its pictures."""
    for folder in [*options.images, *(options.regularization or [])]:
        for sentence in folder_advice(folder):
            print(f"note: {folder}: {sentence}", file=sys.stderr)
    for concept in concepts:
        for sentence in advice(concept):
            print(f"note: {sentence}", file=sys.stderr)


def _train(options: argparse.Namespace, request: TrainingRequest, together: Team) -> None:
    from ..host.diffusers.lending import borrowed_models

    pipeline = load_chosen(options, together.device)
    with borrowed_models(pipeline) as models:
        config = _fitted(request.config, models.denoiser, together.leads)
        request = replace(request, config=config)
        if config.text_encoder_on_cpu:
            models.text_encoder.to(torch.device("cpu"))
        else:
            models.text_encoder.to(models.denoiser.device, models.denoiser.dtype)
        denoiser, encoder = models.denoiser, models.text_encoder
        encoding = {"desc": "encoding pictures", "unit": "view", "disable": not together.leads}
        with tqdm(**encoding, delay=_BAR_AFTER_S) as bar:
            run = prepared(request, denoiser, encoder, models.latent_encoder, progress(bar))
        run = partial(run, denoiser, encoder)
        if not together.leads:
            together.follow(run)
            return
        run = partial(together.train, run)
        finish = partial(_finished, options, denoiser, encoder)
        save_result = partial(_save, options, denoiser)
        if options.jobs:
            networks = (pipeline.unet, pipeline.vae)
            same = training_fingerprint(request, encoder, networks)
            fingerprint = f"{options.output} {same}"

            def keep(result: Concept, own_files: OwnFiles) -> Path:
                output, *_ = _outputs(options)
                try:
                    save_result(finish(result), output, own_files)
                except FileExistsError as error:
                    raise ConceptFileError(
                        f"{error} exists by now. Move it away: the same command then saves what "
                        f"was learnt, without training again."
                    ) from error
                return output

            outputs, settings = _outputs(options), job_settings(options)
            run_as_job(options.jobs, outputs, config, fingerprint, run, keep, settings)
            return
        with (
            tqdm(total=config.steps, desc="training", unit="step") as bar,
            stop_on_interrupt() as stopped,
        ):
            previews = Previews(options.output)
            result = run(should_stop=stopped, on_event=lambda event: _show(event, bar, previews))
        if result.provenance["steps"] == 0:
            print("stopped before the first step: nothing was learnt, nothing was saved")
            return
        save_at_any_rate(partial(save_result, finish(result)), options.output)


def _fitted(config: TrainConfig, denoiser: Denoiser, tells: bool) -> TrainConfig:
    """The same, or with what makes a training fit the card that was named."""
    if not config.card_gb:
        return config
    size = sum(weight.nbytes for weight in denoiser.network.parameters())
    config, said = fit_card(config, denoiser.family, False, size)
    if tells:
        print(f"note: {said}", file=sys.stderr)
    return config


def training_config(options: argparse.Namespace) -> TrainConfig:
    """The model's and the method's recipe, but for what was given."""
    return replace(
        recipe_for(options.model, options.method),
        method=options.method,
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
    options: argparse.Namespace,
    denoiser: DiffusersDenoiser,
    result: Concept,
    output: Path,
    own_files: OwnFiles | None = None,
) -> None:
    """Over what a job has saved before, where the files are one's."""
    if METHODS[options.method].whole_network:
        network, write = _network_file(output), partial(write_network, denoiser.network)
        own_files.write(network, write) if own_files else write(network)
        print(f"saved {network} ({size_of(network)}): the whole UNet")
    if own_files:
        own_files.write(output, partial(write_concept, result))
        say_saved(result, output)
    else:
        save(result, output)


def _outputs(options: argparse.Namespace) -> list[Path]:
    """The concept's file, and that of the UNet where there is one."""
    output = options.output.absolute()
    whole = METHODS[options.method].whole_network
    return [output, _network_file(output)] if whole else [output]


def _network_file(output: Path) -> Path:
    return output.with_name(f"{output.stem}-unet.safetensors")


def _show(event: Event, bar: tqdm[None], previews: Previews) -> None:
    if isinstance(event, StepDone):
        bar.set_postfix(loss=f"{event.loss:.4f}", refresh=False)
        bar.update(event.step - bar.n)
        if event.validation is not None:
            bar.write(f"step {event.step}: validation loss {event.validation:.4f}")
    elif isinstance(event, PreviewDrawn):
        bar.write(f"saved {previews.save(event)}")
    elif isinstance(event, Notice):
        bar.write(event.text())
