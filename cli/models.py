"""The model that a command works with, and the settings that suit it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from ..concept.errors import ConfigError, IncompatibleModelError
from ..formats.base import BaseModel, read_base
from ..host.diffusers.checkpoint import FilePrediction
from ..merge.captions import read_captions
from ..trainer.automatic import native_resolution
from ..trainer.config import MethodName, TrainConfig
from ..trainer.methods import METHODS, recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULTS = TrainConfig()
MINIATURE = "miniature"  # the model that comes with the project
MODEL_HELP = (
    f"a checkpoint (.safetensors) of SD 1.x, SD 2.x or SDXL, a folder in diffusers' layout, or "
    f"{MINIATURE!r}: the small one of the demo"
)
_MINIATURE_FOLDER = Path(__file__).resolve().parents[1] / "miniature"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help=MODEL_HELP,
    )
    add_prediction_option(parser)
    add_device_option(parser)
    parser.add_argument(
        "--precision",
        choices=DTYPES,
        help="what the model computes in; default: bfloat16 on a GPU that has it, else float32",
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=usual, help="what computes: cuda, cuda:1 or cpu")


def add_prediction_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prediction",
        choices=get_args(FilePrediction),
        help="what a checkpoint predicts, if its file does not say: epsilon (noise), v (velocity), "
        "or v-ztsnr (velocity, zero terminal SNR)",
    )


def check_device(name: str) -> None:
    """Raises ConfigError for a device that PyTorch does not know or cannot use here."""
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"--device {name} cannot be used by this PyTorch ({torch.__version__}): {reason}. Use "
            f"--device cpu, which is slow; for a GPU install its driver, and a PyTorch that was "
            f"built for it."
        ) from error


def precision(given: str | None, device: str) -> torch.dtype:
    """What frozen weights compute in: as given, or what suits the device."""
    if given:
        return DTYPES[given]
    has_bf16 = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def need_miniature() -> None:
    """Raises IncompatibleModelError where this installation came without the miniature."""
    if not _MINIATURE_FOLDER.is_dir():
        raise IncompatibleModelError(
            f"This installation has no miniature model, which the demo and {MINIATURE!r} need: it "
            f"is left out of the archive that ComfyUI Manager installs. Get the project's whole "
            f"repository, or give --model a checkpoint."
        )


def load(
    model: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    prediction: FilePrediction | None = None,
) -> Any:
    if model == MINIATURE:
        need_miniature()
        if prediction:
            raise ConfigError(f"{MINIATURE!r} predicts velocity. Leave --prediction out.")
        from ..miniature.model import miniature_pipeline

        return miniature_pipeline().to(device)
    import diffusers
    from transformers.utils import logging as transformers_logging

    from ..host.diffusers.loading import load_pipeline

    # They warn of what is not so, and show a bar for every text encoder.
    diffusers.logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return load_pipeline(model, device, dtype, prediction)


def load_chosen(options: argparse.Namespace, device: str = "") -> Any:
    """The model of `add_model_options`, on a device of its own where one is named."""
    device = device or options.device
    dtype = precision(options.precision, device)
    return load(options.model, device, dtype, options.prediction)


def add_resolution_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resolution", type=int, help="of the pictures; default: the model's own")


def resolution_for(options: argparse.Namespace, pipeline: Any) -> int:
    """What `add_resolution_option` was given, or what the model draws best at."""
    if options.resolution or options.model == MINIATURE:
        return options.resolution or recipe_for(MINIATURE).resolution
    from ..host.diffusers.lending import text_family

    velocity = pipeline.scheduler.config.prediction_type == "v_prediction"
    return native_resolution(text_family(pipeline), velocity)


def recipe_for(model: str, method: MethodName = DEFAULTS.method) -> TrainConfig:
    """The training settings that suit a model and a method."""
    if model != MINIATURE:
        return recipe(method)
    need_miniature()
    from ..miniature.model import CONFIG, EVERY_WORD

    slower = recipe(method).learning_rate / DEFAULTS.learning_rate
    settings = CONFIG if METHODS[method].splices else EVERY_WORD
    return replace(settings, learning_rate=slower * settings.learning_rate)


def captions_for(model: str, file: Path | None = None) -> list[str] | None:
    """Regularization captions of a merge or a projection; None for our own."""
    if file:
        return read_captions(file)
    if model != MINIATURE:
        return None
    need_miniature()
    from ..miniature.world import world_captions

    return world_captions()


def base_model(model: str) -> BaseModel:
    """The cross-attention of a checkpoint, of a folder in diffusers' layout, or of the miniature;
    nothing else of it is loaded.
    """
    if model == MINIATURE:
        return BaseModel.of(load(MINIATURE).unet.named_parameters())
    return read_base(Path(model))
