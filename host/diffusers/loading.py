"""Loading a pipeline, and the network that a training has left for one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ...concept.errors import ConceptFileError, IncompatibleModelError
from ...concept.tensors import read_tensors
from ...formats.base import model_folder
from .checkpoint import FilePrediction, read_checkpoint
from .denoiser import _projections
from .folder import read_pipeline
from .lending import _text_models, text_family


def load_pipeline(
    place: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    prediction: FilePrediction | None = None,
) -> Any:
    """A pipeline of Stable Diffusion 1.x, 2.x or XL from a folder in diffusers' layout, which may
    be one of Hugging Face's cache, or from a checkpoint in one .safetensors.

    `prediction` is for a checkpoint that does not say what it predicts; folders say it. Frozen
    weights compute in `dtype`; the UNet's key and value projections keep float32, from which they
    are trained, and so does SDXL's autoencoder, whose numbers grow too large for half precision.
    Nothing that the model's files hold is executed, and nothing is downloaded.
    """
    pipeline = _read(Path(place), prediction)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    for model in _text_models(pipeline):  # transformers leaves them in the type of their file
        model.float()
    exact = {path: module.weight.detach() for path, module in _projections(pipeline.unet)}
    pipeline.unet.to(dtype)
    if not text_family(pipeline).pooled_width:
        pipeline.vae.to(dtype)
    for path, weight in exact.items():
        pipeline.unet.get_submodule(path).weight.data = weight
    return pipeline


def _read(place: Path, prediction: FilePrediction | None) -> Any:
    if not os.path.isdir(place):
        return read_checkpoint(place, prediction)
    if prediction:
        raise IncompatibleModelError(
            f"{place} is a folder, whose scheduler/scheduler_config.json says what the model "
            f"predicts. Change prediction_type there, or leave the prediction out."
        )
    return read_pipeline(model_folder(place))


def load_network(pipeline: Any, path: Path) -> None:
    """Gives the pipeline's UNet the weights of a file, as `trainer.network_file` writes it."""
    try:
        pipeline.unet.load_state_dict(read_tensors(path)[0])
    except (ConceptFileError, RuntimeError) as error:
        raise IncompatibleModelError(
            f"{path} holds no UNet of this model ({str(error).splitlines()[0]}). Give the file "
            f"that `train --method dreambooth` or `fine-tune all` left for it."
        ) from error
