"""`custom-diffusion evaluate`"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..attention.boxes import boxes_of
from ..composition.routing import Route
from ..concept.atomic import write_atomically, write_text_atomically
from ..concept.concept import Concept
from ..concept.errors import ConfigError, DataError
from ..concept.file import read_concept
from ..concept.plain import json_text
from ..concept.regular_files import read_regular
from ..evaluation.features import WORD, Judge
from ..evaluation.prompts import Taught, Together, check_prompts, names_of, read_prompts
from ..evaluation.report import alignment_plot, as_json, sheet, table, verdict
from ..evaluation.scores import measure
from ..evaluation.trials import Drawn, Plan, Trial, concept_fingerprint, draw_trials
from ..inspection.report import aligned
from ..trainer.data.captioned import CaptionedImage
from ..trainer.data.folders import load_folder
from ..trainer.jobs.fingerprint import models_fingerprint
from .models import (
    MINIATURE,
    add_model_options,
    add_resolution_option,
    load_chosen,
    resolution_for,
)
from .output import progress
from .parsing import positive

_MOST_PROMPT_BYTES = 1_000_000
_ON_SHEET = 8


def add_to(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="say how good a concept is, with figures and a sheet of pictures",
        description="Draws prompts with a concept at each strength and with the base model. A "
        "feature model compares the pictures with the prompts and with yours. Stop it at any time: "
        "the same command resumes. More prompts, seeds or strengths draw only what is new.",
        example="evaluate --model sd15.safetensors --concept cat.safetensors --references my_cat "
        "--judge clip-vit-large-patch14 --output cat_evaluation",
    )
    add_model_options(evaluate)
    evaluate.add_argument(
        "--concept",
        type=Path,
        nargs="+",
        required=True,
        help="what to evaluate; several need --routed",
    )
    evaluate.add_argument(
        "--routed",
        action="store_true",
        help="let concepts act at their own words alone, as Route Concepts does, instead of adding "
        "one to the weights",
    )
    evaluate.add_argument(
        "--references",
        type=Path,
        nargs="+",
        required=True,
        metavar="FOLDER",
        help="your pictures; with several trigger words a folder for each, in the order of "
        "`inspect` and of --concept. With two or more each subject is also looked for in the "
        "pictures and compared with all; masks beside your pictures say where it is there",
    )
    evaluate.add_argument(
        "--judge",
        required=True,
        metavar="FOLDER",
        help="a CLIP or DINOv2, as transformers or open_clip saves it; nothing is downloaded",
    )
    evaluate.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one per line, {} stands for the concept; default: ours",
    )
    evaluate.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1],
        help="one picture of each prompt for each; default: 0 1",
    )
    evaluate.add_argument(
        "--strengths", type=float, nargs="+", default=[1.0], help="of the concept; default: 1"
    )
    evaluate.add_argument(
        "--class-pictures",
        type=Path,
        metavar="FOLDER",
        help="real pictures of the class, not used in training: tells how much the class changed",
    )
    evaluate.add_argument(
        "--class-count", type=positive, default=50, help="pictures of the class to draw for that"
    )
    add_resolution_option(evaluate)
    evaluate.add_argument("--steps", type=positive, default=50, help="sampling steps (DDIM)")
    evaluate.add_argument(
        "--guidance", type=float, default=6.0, help="how closely they follow the prompt (CFG)"
    )
    evaluate.add_argument("--batch-size", type=positive, default=4, help="pictures at once")
    evaluate.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="where pictures and scores go"
    )
    evaluate.set_defaults(command=evaluate_command)


def evaluate_command(options: argparse.Namespace) -> None:
    concepts = tuple(map(read_concept, options.concept))
    if len(concepts) > 1 and not options.routed:
        raise ConfigError(
            f"{len(concepts)} concepts were given. Add --routed to draw them together, each at its "
            f"own words; or merge them first, and evaluate the merge."
        )
    concept = Together(concepts) if len(concepts) > 1 else concepts[0]
    references = _references(options.references, concept)
    real = load_folder(options.class_pictures, "") if options.class_pictures else ()
    plan = Plan(
        concept,
        read_prompts(_text(options.prompts) if options.prompts else ""),
        tuple(options.seeds),
        tuple(options.strengths),
        options.class_count if real else 0,
        tuple(references) if len(references) > 1 else (),
    )
    for remark in check_prompts(plan.prompts, concept):
        print(f"warning: {remark}")
    judge = _judge(options)
    pipeline = load_chosen(options)
    judge = judge.compared_with(_words(pipeline))
    _draw(options, concepts, plan, pipeline)
    with tqdm(desc="judging", unit="picture") as bar:
        found = measure(
            plan,
            options.output,
            judge,
            {name: map(_image, images) for name, images in references.items()},
            map(_image, real),
            progress(bar),
            {name: map(_subject, images) for name, images in references.items()},
        )
    first = [_image(image) for images in references.values() for image in images[:_ON_SHEET]]
    pictures = {
        "plot.png": alignment_plot(found),
        "sheet.png": sheet(plan, options.output, first, found),
    }
    for name, picture in pictures.items():
        write_atomically(options.output / name, partial(picture.save, format="PNG"))
    write_text_atomically(options.output / "scores.json", json_text(as_json(found)))
    print("\n".join([*aligned(table(found)), *verdict(found)]))
    for remark in found.remarks:
        print(f"warning: {remark}")
    print(f"scores.json, sheet.png, plot.png and every picture are in {options.output}")


def _references(folders: Sequence[Path], concept: Taught) -> dict[str, tuple[CaptionedImage, ...]]:
    names = names_of(concept)
    if len(folders) > len(names):
        raise ConfigError(
            f"{len(folders)} folders of references were given for {len(names)} trigger words of "
            f"{concept.describe()}. Give one for each."
        )
    return {name: load_folder(folder, "") for name, folder in zip(names, folders, strict=False)}


def _image(image: CaptionedImage) -> Image.Image:
    return image.open().image


def _subject(image: CaptionedImage) -> Image.Image:
    return image.open().subject()


def _text(file: Path) -> str:
    try:
        return read_regular(file, _MOST_PROMPT_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"The prompts {file} cannot be read ({error}). Give a UTF-8 text file, a prompt a line."
        ) from error


def _judge(options: argparse.Namespace) -> Judge:
    if options.judge == MINIATURE == options.model:
        from ..miniature.features import miniature_judge

        return miniature_judge()
    from ..host.judges import read_judge

    return read_judge(Path(options.judge), options.device)


def _words(pipeline: Any) -> Iterator[Tensor]:
    """How the pipeline's text encoders embed the word by which a judge's is known again."""
    from ..host.diffusers.lending import text_encoder

    yield from text_encoder(pipeline).vocabulary_row(WORD).values()


def _draw(
    options: argparse.Namespace, concepts: Sequence[Concept], plan: Plan, pipeline: Any
) -> None:
    from ..host.diffusers.lending import borrowed_models

    resolution = resolution_for(options, pipeline)
    with borrowed_models(pipeline) as models:
        fingerprint = models_fingerprint(models.text_encoder, (pipeline.unet, pipeline.vae))
    settings = {
        "model": fingerprint,
        "concept": " ".join(map(concept_fingerprint, concepts)),
        "steps": options.steps,
        "guidance": options.guidance,
        "resolution": resolution,
        **({"use": "routed"} if options.routed else {}),
    }
    with tqdm(desc="drawing", unit="picture") as bar:
        draw_trials(
            options.output,
            settings,
            plan.everything(),
            partial(_drawn, options, concepts, pipeline, resolution),
            batch_size=options.batch_size,
            on_progress=progress(bar),
        )


def _drawn(
    options: argparse.Namespace,
    concepts: Sequence[Concept],
    pipeline: Any,
    resolution: int,
    trials: Sequence[Trial],
) -> Drawn:
    from ..host.diffusers.attention import watched_words, watching
    from ..host.diffusers.lending import text_encoder
    from ..host.diffusers.sampling import sample

    first = trials[0]
    taught = concepts if first.strength else ()
    with ExitStack() as watch:
        if first.subjects:
            encoder: Any = text_encoder(pipeline)
            for concept in taught:
                encoder = encoder.with_tokens(concept.embeddings())
            words = watched_words(encoder, first.prompt, [text for _, text in first.subjects])
            recorder = watch.enter_context(watching(pipeline, words))
        images = sample(
            pipeline,
            [trial.prompt for trial in trials],
            next(iter(taught), None) if not options.routed else None,
            strength=first.strength,
            routes=[Route(one, first.strength) for one in taught] if options.routed else (),
            resolution=resolution,
            seeds=[trial.seed for trial in trials],
            steps=options.steps,
            guidance=options.guidance,
        )
    if not first.subjects:
        return Drawn(images)
    return Drawn(images, boxes_of(recorder.maps().between(), [name for name, _ in first.subjects]))
