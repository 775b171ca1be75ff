"""A Stable Diffusion pipeline from a folder in diffusers' layout, read as data.

`from_pretrained` obeys what a folder says of itself: which classes to build, from which modules,
with which adapters, quantizers or kernels, and some of that can run code that came with the folder
or is downloaded. Here the classes are fixed, of each configuration only known plain settings are
read, weights are .safetensors alone, and nothing is looked up anywhere else.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...concept.errors import ConceptFileError, IncompatibleModelError
from ...concept.plain import read_json
from ...concept.regular_files import read_regular
from ...concept.tensors import read_tensors
from ...formats.base import weight_files
from .assembly import assemble, reading
from .tokenizer import MOST_JSON_BYTES, read_tokenizer

_SD, _SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
_FILES = {
    "scheduler": ("scheduler_config.json", ""),
    **{part: ("config.json", "diffusion_pytorch_model") for part in ("unet", "vae")},
    **{f"text_encoder{number}": ("config.json", "model") for number in ("", "_2")},
}
"""Part → its settings, and how the names of its weights begin"""
_MOST = {
    **{"num_hidden_layers": 64, "layers_per_block": 8, "block_out_channels": 1 << 16},
    **{"transformer_layers_per_block": 16, "reverse_transformer_layers_per_block": 16},
    "num_train_timesteps": 10_000,
}
"""What a few digits would make large, before any weight is compared with it: at least twice what
SD and SDXL have
"""
_MOST_BLOCKS = 8
_OLD_ATTENTION = re.compile(r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Autoencoders written before diffusers 0.15 name the parts of their attention otherwise."""


def read_pipeline(folder: Path) -> Any:
    """The pipeline in a folder, as `assemble` makes it.

    Every weight is in memory of its own; the files may change or vanish afterwards.
    """
    if not os.path.isfile(folder / "model_index.json"):
        raise IncompatibleModelError(
            f"{folder} is no Stable Diffusion pipeline in diffusers' layout: it has no "
            f"model_index.json. Give the folder of a downloaded pipeline{_inside(folder)}."
        )
    with reading(folder):
        kind = _settings(folder / "model_index.json").get("_class_name")
        if kind not in (_SD, _SDXL):
            raise IncompatibleModelError(
                f"it is a {kind}; needed is a {_SD} or a {_SDXL}, not a refiner"
            )
    return assemble(_Folder(folder, kind == _SDXL))


class _Folder:
    """A folder as `assembly.Source`."""

    def __init__(self, place: Path, is_xl: bool) -> None:
        self.place, self.is_xl = place, is_xl

    def settings(self, part: str) -> Mapping[str, Any]:
        return _settings(self.place / part / _FILES[part][0])

    def weights(self, part: str) -> dict[str, Tensor]:
        weights = _weights(self.place / part, _FILES[part][1])
        if part not in ("unet", "vae"):
            return weights
        return {_OLD_ATTENTION.sub(_attention_name, name): w for name, w in weights.items()}

    def tokenizer(self, part: str, rows: int) -> Any:
        return read_tokenizer(self.place / part, rows)


def _inside(folder: Path) -> str:
    """What could be meant where a folder holds checkpoints."""
    if not os.path.isdir(folder):
        return ""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    return f", or a checkpoint in one file, such as {folder / files[0]}" if files else ""


def _attention_name(match: re.Match[str]) -> str:
    return f"{match[1]}.{_NEW_ATTENTION[match[2]]}."


def _settings(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    if not file.is_file():
        raise IncompatibleModelError(f"it has no {file.parent.name}/{file.name}")
    settings = read_json(read_regular(file, MOST_JSON_BYTES).decode())
    if not isinstance(settings, dict):
        raise IncompatibleModelError(f"its {file.parent.name}/{file.name} is no JSON object")
    for name, most in _MOST.items():
        numbers = _flat(settings.get(name))
        few = len(numbers) <= _MOST_BLOCKS
        if not few or not all(type(number) is int and 0 < number <= most for number in numbers):
            raise IncompatibleModelError(
                f"the {name} in its {file.parent.name}/{file.name} is "
                f"{reprlib.repr(settings[name])}; needed are whole numbers from 1 to {most}, for "
                f"at most {_MOST_BLOCKS} blocks"
            )
    return settings


def _flat(value: Any) -> list[Any]:
    """A number, or those in a list of lists; none of null."""
    if isinstance(value, list):
        return [number for part in value for number in _flat(part)]
    return [] if value is None else [value]


def _weights(folder: Path, stem: str) -> dict[str, Tensor]:
    """The weights of a part, floating point as float32, in memory of their own."""
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder, stem):
        try:
            tensors, _ = read_tensors(file)
        except ConceptFileError as error:
            raise IncompatibleModelError(
                f"its {folder.name}/{file.name} is no readable .safetensors: {error}"
            ) from error
        for name, tensor in tensors.items():
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
    return weights
