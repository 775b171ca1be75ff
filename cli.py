"""The pack without ComfyUI: `custom-diffusion train | merge | sample | regularize | retrieve |
inspect | demo`.

diffusers is imported when a command needs a model, so that `inspect` works without it.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import torch
from tqdm import tqdm

from .concept.concept import Concept, LowRankDelta
from .concept.errors import ConceptFileError, ConfigError, CustomDiffusionError
from .concept.file import read_concept, write_concept
from .concept.prompts import DEFAULT_TEMPLATE, STYLE_TEMPLATE
from .host.open_clip_text import MODEL, WEIGHTS
from .merge.captions import read_captions
from .merge.compose import DEFAULT_RELATIVE_RIDGE, merge_concepts
from .trainer.config import Fit, GradientCut, MethodName, TrainConfig
from .trainer.data import TrainingConcept, instance_caption, load_folder
from .trainer.generated_set import generated_set
from .trainer.loop import Event, MemoryShort, StepDone, train
from .trainer.methods import METHODS, recipe
from .trainer.network_file import fold_in, write_network
from .trainer.prepare import prepare
from .trainer.projections import base_hash
from .trainer.retrieval.collection import parts_of
from .trainer.retrieval.index import CaptionIndex
from .trainer.retrieval.retrieve import COUNT, LEAST_SIMILARITY, retrieve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULTS = TrainConfig()
MINIATURE = "miniature"  # the model that comes with the project
_RECIPE = (
    "rank",
    "steps",
    "batch_size",
    "micro_batch_size",
    "learning_rate",
    "resolution",
    "gradient_cut",
    "fit",
)
INTERRUPTED = 130  # exit status after Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; errors that users can mend are one message and exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except CustomDiffusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: files that were written are complete", file=sys.stderr)
        return INTERRUPTED
    return 0


def train_command(options: argparse.Namespace) -> None:
    from .host.diffusers import borrowed_models

    network = options.output.with_name(f"{options.output.stem}-unet.safetensors")
    _check_new(options.output)
    whole_network = METHODS[options.method].whole_network
    if whole_network:
        _check_new(network)
    given = {name: getattr(options, name) for name in _RECIPE}
    config = replace(
        _recipe(options.model, options.method),
        method=options.method,
        **{name: value for name, value in given.items() if value is not None},
        gradient_checkpointing=options.gradient_checkpointing,
        augment=not options.no_augment,
        flip=not options.no_flip,
        preview_every_steps=0,
        seed=options.seed,
    )
    concepts = _training_concepts(options)
    start = read_concept(options.start) if options.start else None
    pipeline = _load(options.model, options.device, DTYPES[options.precision])
    with borrowed_models(pipeline) as models:
        with tqdm(desc="encoding pictures", unit="view") as bar:
            banks = [
                prepare(one, config, models.latent_encoder, models.text_encoder, _progress(bar))
                for one in concepts
            ]
        with (
            tqdm(total=config.steps, desc="training", unit="step") as bar,
            _stop_on_interrupt() as stopped,
        ):
            result = train(
                config,
                concepts,
                banks,
                models.denoiser,
                models.text_encoder,
                start=start,
                should_stop=stopped,
                on_event=lambda event: _show(event, bar),
            )
        if result.provenance["steps"] == 0:
            print("stopped before the first step: nothing was learnt, nothing was saved")
            return
        if whole_network:
            result = fold_in(models.denoiser, result)
            write_network(models.denoiser.network, network)
            print(f"saved {network} ({network.stat().st_size / 1e6:.1f} MB): the whole UNet")
    _report_saved(result, write_concept(result, options.output))


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


def merge_command(options: argparse.Namespace) -> None:
    from .host.diffusers import text_encoder

    _check_new(options.output)
    concepts = [read_concept(path) for path in options.concepts]
    if options.tokens:
        if len(options.tokens) != len(concepts):
            raise ConfigError(
                f"{len(options.tokens)} names were given for the tokens of {len(concepts)} "
                f"concepts. Give one for each."
            )
        renamed = zip(concepts, options.tokens, strict=True)
        concepts = [concept.with_token(token) for concept, token in renamed]
    with tqdm(total=100, desc="merging", unit="%") as bar:
        merged, report = merge_concepts(
            concepts,
            text_encoder(_load(options.model)),
            strengths=options.strengths,
            captions=_captions(options),
            relative_ridge=options.ridge,
            cache_folder=options.cache,
            on_progress=lambda fraction: _show_percent(fraction, bar),
        )
    print(report.text())
    _report_saved(merged, write_concept(merged, options.output))


def sample_command(options: argparse.Namespace) -> None:
    from .host.diffusers import load_network, sample, side_by_side

    pipeline = _load(options.model, options.device, DTYPES[options.precision])
    if options.unet:
        load_network(pipeline, options.unet)
    concept = read_concept(options.concept) if options.concept else None
    pictures = sample(
        pipeline,
        [options.prompt] * options.count,
        concept,
        strength=options.strength,
        resolution=options.resolution or _recipe(options.model).resolution,
        seeds=range(options.seed, options.seed + options.count),
    )
    side_by_side(pictures).save(options.output)
    print(f"saved {options.output}")


def regularize_command(options: argparse.Namespace) -> None:
    from .host.diffusers import borrowed_models, sample

    pipeline = _load(options.model, options.device, DTYPES[options.precision])
    resolution = options.resolution or _recipe(options.model).resolution
    caption = instance_caption("", options.class_noun)
    with borrowed_models(pipeline) as models:
        settings = {
            "model": base_hash(models.denoiser),
            "seed": options.seed,
            "steps": options.steps,
            "guidance": options.guidance,
            "resolution": resolution,
        }
    with tqdm(desc=f"drawing {caption!r}", unit="picture") as bar:
        generated_set(
            options.output,
            settings,
            caption,
            options.count,
            lambda numbers: sample(
                pipeline,
                [caption] * len(numbers),
                resolution=resolution,
                seeds=[options.seed + number for number in numbers],
                steps=options.steps,
                guidance=options.guidance,
            ),
            on_progress=_progress(bar),
        )
    print(f"{options.count} pictures are in {options.output}")


def retrieve_command(options: argparse.Namespace) -> None:
    from .host.open_clip_text import OpenClipText

    parts_of(options.collection)  # a wrong folder is refused before CLIP is loaded
    embed = OpenClipText(options.clip, options.clip_weights, options.device)
    index = CaptionIndex(options.collection, options.index, embed.name)
    with tqdm(desc="reading captions", unit="part") as bar:
        captions = index.update(embed, _progress(bar))
    prompt = options.prompt or instance_caption("", options.class_noun)
    got = retrieve(index, embed, prompt, options.output, options.count, options.similarity)
    print(
        f"{len(got.images)} of {captions} pictures are in {options.output}: similarity to "
        f"{prompt!r} at least {got.least_similarity:.2f}; {got.broken} broken ones passed over"
    )


def inspect_command(options: argparse.Namespace) -> None:
    concept = read_concept(options.file)
    ranks = sorted({d.rank for d in concept.deltas.values() if isinstance(d, LowRankDelta)})
    print(f"{options.file}: {options.file.stat().st_size / 1e6:.1f} MB")
    print(f"base model: {concept.family.title}, projections {concept.base_hash or 'unknown'}")
    for token in concept.tokens:
        start = token.initializer or "a rare token"
        print(f"token: {token.name} {token.class_noun} (started from {start})")
    print(f"projections: {len(concept.deltas)}, {f'rank {ranks}' if ranks else 'dense'}")
    print(f"kept by a merge: {', '.join(concept.constraint_prompts) or 'nothing'}")
    for fact in ("method", "steps", "instance_images", "regularization_images", "strengths"):
        if fact in concept.provenance:
            print(f"{fact.replace('_', ' ')}: {concept.provenance[fact]}")


def demo_command(options: argparse.Namespace) -> None:
    from .miniature.demo import run_demo

    run_demo(options.output)


def _recipe(model: str, method: MethodName = DEFAULTS.method) -> TrainConfig:
    """The training settings that suit a model and a method."""
    if model != MINIATURE:
        return recipe(method)
    from .miniature.model import CONFIG

    slower = recipe(method).learning_rate / DEFAULTS.learning_rate
    return replace(CONFIG, learning_rate=slower * CONFIG.learning_rate)


def _load(model: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    if model == MINIATURE:
        from .miniature.model import miniature_pipeline

        return miniature_pipeline().to(device)
    from .host.diffusers import load_pipeline

    return load_pipeline(model, device, dtype)


def _captions(options: argparse.Namespace) -> list[str] | None:
    """Regularization captions of a merge; None for our own."""
    if options.captions:
        return read_captions(options.captions)
    if options.model != MINIATURE:
        return None
    from .miniature.world import world_captions

    return world_captions()


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks once for an orderly stop, which saves; a second one interrupts as usual."""
    asked = threading.Event()

    def ask(_signal: int, _frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _progress(bar: tqdm[None]) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return show


def _show_percent(fraction: float, bar: tqdm[None]) -> None:
    bar.update(int(100 * fraction) - bar.n)


def _show(event: Event, bar: tqdm[None]) -> None:
    if isinstance(event, StepDone):
        bar.set_postfix(loss=f"{event.loss:.4f}", refresh=False)
        bar.update(event.step - bar.n)
    elif isinstance(event, MemoryShort):
        bar.write(event.text())


def _check_new(output: Path) -> None:
    if output.exists():
        raise ConceptFileError(
            f"{output} exists already. Choose another --output, or move it away."
        )


def _report_saved(concept: Concept, path: Path) -> None:
    print(f"saved {path} ({path.stat().st_size / 1e6:.1f} MB): {concept.describe()}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="custom-diffusion", description="Teach Stable Diffusion concepts, and merge them."
    )
    commands = parser.add_subparsers(required=True)

    demo = commands.add_parser(
        "demo", help="the whole way on a small model that comes with this, in minutes"
    )
    demo.add_argument("--output", type=Path, default=Path("demo"), metavar="FOLDER")
    demo.set_defaults(command=demo_command)

    teach = commands.add_parser(
        "train",
        help="teach concepts from folders of pictures",
        description="Teaches a concept, or several together into one file: then give as many "
        "class nouns and tokens as folders. The defaults are Stable Diffusion's; the miniature has "
        "its own steps, batch, rate and resolution.",
    )
    _model_options(teach)
    teach.add_argument(
        "--images", type=Path, nargs="+", required=True, help="folder of 4 to 20 pictures"
    )
    teach.add_argument(
        "--class-noun", nargs="+", required=True, help="everyday word for the thing: cat"
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
        choices=METHODS,
        default=DEFAULTS.method,
        help="; ".join(f"{name}: {method.description}" for name, method in METHODS.items()),
    )
    teach.add_argument("--rank", type=int, help=f"of low-rank, default {DEFAULTS.rank}")
    teach.add_argument("--steps", type=int, help=f"default {DEFAULTS.steps}, or the method's own")
    teach.add_argument("--batch-size", type=int, help=f"default {DEFAULTS.batch_size}")
    teach.add_argument(
        "--micro-batch-size", type=int, help="pictures computed at once; default all of a step"
    )
    teach.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="less memory, about a third slower; comes by itself when memory runs out",
    )
    teach.add_argument("--learning-rate", type=float, help="default: the method's own")
    teach.add_argument("--resolution", type=int, help=f"default {DEFAULTS.resolution}")
    teach.add_argument("--gradient-cut", choices=get_args(GradientCut))
    teach.add_argument("--no-augment", action="store_true", help="no random sizes")
    teach.add_argument("--no-flip", action="store_true", help="no mirrored views")
    teach.add_argument("--fit", choices=get_args(Fit), help="of pictures that are not square")
    teach.add_argument("--seed", type=int, default=DEFAULTS.seed)
    teach.add_argument("--output", type=Path, default=Path("concept.safetensors"))
    teach.set_defaults(command=train_command)

    merge = commands.add_parser("merge", help="merge concepts by constrained least squares")
    merge.add_argument("concepts", type=Path, nargs="+", metavar="CONCEPT")
    merge.add_argument("--model", required=True, help="base model; its text encoder is used")
    merge.add_argument("--strengths", type=float, nargs="+", help="one for each concept")
    merge.add_argument("--tokens", nargs="+", help="new names of the concepts' tokens")
    merge.add_argument("--captions", type=Path, help="your own captions, one a line")
    merge.add_argument("--ridge", type=float, default=DEFAULT_RELATIVE_RIDGE)
    merge.add_argument("--cache", type=Path, help="folder that keeps the captions' factor")
    merge.add_argument("--output", type=Path, default=Path("merged.safetensors"))
    merge.set_defaults(command=merge_command)

    draw = commands.add_parser("sample", help="draw pictures, with a concept or without")
    _model_options(draw)
    draw.add_argument("--prompt", required=True)
    draw.add_argument("--concept", type=Path)
    draw.add_argument("--unet", type=Path, help="a whole UNet that was trained here")
    draw.add_argument("--strength", type=float, default=1.0)
    draw.add_argument("--count", type=int, default=1)
    draw.add_argument("--resolution", type=int, help=f"default {DEFAULTS.resolution}")
    draw.add_argument("--seed", type=int, default=0)
    draw.add_argument("--output", type=Path, default=Path("sample.png"))
    draw.set_defaults(command=sample_command)

    regularize = commands.add_parser(
        "regularize",
        help="let the model draw a regularization set",
        description="Draws pictures of the bare class into a folder, for `train --regularization`. "
        "Stop it at any time: the same command goes on. Photographs of the class work better.",
    )
    _model_options(regularize)
    regularize.add_argument("--class-noun", required=True)
    regularize.add_argument("--count", type=int, default=200)
    regularize.add_argument("--resolution", type=int, help=f"default {DEFAULTS.resolution}")
    regularize.add_argument("--steps", type=int, default=25, help="of the sampler, DDIM")
    regularize.add_argument("--guidance", type=float, default=6.0)
    regularize.add_argument("--seed", type=int, default=0)
    regularize.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    regularize.set_defaults(command=regularize_command)

    find = commands.add_parser(
        "retrieve",
        help="take a regularization set from a captioned collection of your own",
        description="Copies the pictures whose captions are nearest to the class into a folder, "
        "for `train --regularization`. The collection may be folders with .txt files, webdataset "
        "shards or parquet tables (img2dataset writes all of them), of any size: captions are "
        "read once.",
    )
    find.add_argument("--collection", type=Path, required=True, metavar="FOLDER")
    find.add_argument("--class-noun", required=True)
    find.add_argument("--prompt", help="default: 'photo of a' and the class noun")
    find.add_argument("--count", type=int, default=COUNT)
    find.add_argument("--similarity", type=float, default=LEAST_SIMILARITY, help="at least, 0..1")
    find.add_argument("--clip", default=MODEL, help=f"open_clip's name of a model, default {MODEL}")
    find.add_argument(
        "--clip-weights", default=WEIGHTS, help="a file, or open_clip's name: downloaded once"
    )
    find.add_argument("--index", type=Path, default=Path("caption-index"), metavar="FOLDER")
    find.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    find.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    find.set_defaults(command=retrieve_command)

    look = commands.add_parser("inspect", help="what a concept file holds")
    look.add_argument("file", type=Path)
    look.set_defaults(command=inspect_command)
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help=f"folder in diffusers' layout, or {MINIATURE!r}: the small one of the demo",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=DTYPES, default="float32", help="of frozen weights")
