"""The base model of a file whose changes depend on it: those of whole weights and of DoRA."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from torch import Tensor

from ..concept.concept import hash_projections
from ..concept.errors import ConceptFileError, IncompatibleModelError, UnreadableFileError
from ..concept.layers import Family, family_of_width, is_projection
from ..concept.plain import read_json
from ..concept.tensors import opened, read_tensors
from .names import layer_of
from .relative import Relative, Whole

_FARTHEST = 0.5
"""Relative change above which weights are of another base. Custom Diffusion moves keys and values
by a few per cent; unrelated weights differ by more than their own norm."""
_STEM = "diffusion_pytorch_model"
_INDEX = ".index"
_VARIANTS = "", ".fp16", ".bf16", ".fp32", ".non_ema"
"""How the name of a file may go on that holds the same weights, rounded or not averaged; the first
that is there is taken
"""
_LARGEST_INDEX = 8 << 20
"""Bytes; what is behind them is not read, and then the index is none"""


@dataclass(frozen=True)
class BaseModel:
    """The matrices of a base model's cross-attention, by layer; (out, in) each."""

    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, parameters: Iterable[tuple[str, Tensor]]) -> BaseModel:
        """From a network's parameters, by original names or diffusers'; others are passed over."""
        named = ((layer_of(name.removesuffix(".weight")), weight) for name, weight in parameters)
        return cls({layer: weight.detach() for layer, weight in named if layer})

    @property
    def family(self) -> Family:
        keys = next((w for layer, w in self.weights.items() if is_projection(layer)), None)
        if keys is None:
            raise IncompatibleModelError(
                "The base model given has no cross-attention with key and value projections. "
                "Give a checkpoint of SD 1.x, SD 2.x or SDXL."
            )
        return family_of_width(keys.shape[1])

    @property
    def hash(self) -> str:
        return hash_projections({k: w for k, w in self.weights.items() if is_projection(k)})

    def changes(self, relative: Mapping[str, Relative]) -> tuple[dict[str, Tensor], float | None]:
        """What is added to each matrix, in float32; and how far the matrices in the file are from
        the base's, as a share of their norm, None where the file holds no matrices.

        Raises IncompatibleModelError where layers or shapes differ, and where the weights are so
        far from the base that they must belong to another one; ValueError where a change does not
        fit its matrix.
        """
        changes: dict[str, Tensor] = {}
        squares = [0.0, 0.0]
        for layer, one in relative.items():
            own = self._weight(layer, one.shape)  # first: forged factors can be huge
            try:
                changes[layer] = one.change(own)
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"{layer}: {error}") from error
            if one.tells_base:
                for index, matrix in enumerate((changes[layer], own)):
                    squares[index] += float(matrix.double().square().sum())
        if not any(one.tells_base for one in relative.values()):
            return changes, None
        moved = math.sqrt(squares[0] / squares[1]) if squares[1] else math.inf
        # Of a DoRA nobody can say how far its training went, so that is shown and not judged.
        if not moved <= _FARTHEST and any(isinstance(one, Whole) for one in relative.values()):
            raise IncompatibleModelError(
                f"The weights in the file differ from the base model given by {moved:.0%} of their "
                f"norm; training moves them by a few per cent. They were trained on another base "
                f"model: give that one."
            )
        return changes, moved

    def _weight(self, layer: str, shape: tuple[int | None, int | None]) -> Tensor:
        """In float32, on the CPU, beside a matrix of the file that has this shape."""
        own = self.weights.get(layer)
        fits = own is not None and all(
            size in (None, there) for size, there in zip(shape, own.shape, strict=True)
        )
        if own is None or not fits:
            given = "absent" if own is None else tuple(own.shape)
            needed = tuple("any" if size is None else size for size in shape)
            raise IncompatibleModelError(
                f"{layer} is {needed} in the file and {given} in the base model, "
                f"{self.family.title}. Give the model that the file was trained on."
            )
        return own.to("cpu").float()


def read_base(path: Path) -> BaseModel:
    """The base from a checkpoint (.safetensors, original or diffusers' layout), from a folder in
    diffusers' layout, or from the index of a model in several files. Only its cross-attention is
    read.
    """
    file = path = model_folder(path)
    if os.path.isdir(path):
        unet = path / "unet" if os.path.isdir(path / "unet") else path
        file = _weight_file(unet, _STEM) or unet / f"{_STEM}.safetensors"
    if not os.path.isfile(file):
        raise ConceptFileError(
            f"There is no base model {file}. Give a checkpoint as .safetensors, or a folder in "
            "diffusers' layout."
        )
    weights: dict[str, Tensor] = {}
    for part in _parts(file):
        weights |= read_cross_attention(part)
    base = BaseModel.of(weights.items())
    try:
        _ = base.family  # a checkpoint without cross-attention is refused here
    except IncompatibleModelError as error:
        raise IncompatibleModelError(f"{file.name}: {error}") from error
    return base


def model_folder(path: Path) -> Path:
    """The newest snapshot in a folder of Hugging Face's cache, `models--owner--name`; of any other
    path the path itself.
    """
    if not os.path.isdir(path / "snapshots"):
        return path
    snapshots = [one for one in (path / "snapshots").iterdir() if os.path.isdir(one)]
    if not snapshots:
        raise ConceptFileError(
            f"{path} is a folder of Hugging Face's cache without a snapshot: the download was not "
            f"finished. Download the model again."
        )
    return max(snapshots, key=lambda one: one.stat().st_mtime)


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The .safetensors of a part of a model in diffusers' layout: one, or several with an index;
    rounded ones (`.fp16`) where there are no others. Raises IncompatibleModelError.
    """
    file = _weight_file(folder, stem)
    if file is not None:
        return _parts(file)
    others = sorted(found.name for found in folder.glob(f"{stem}*") if found.is_file())
    raise IncompatibleModelError(
        f"its {folder.name} has no {stem}.safetensors"
        + (
            f", only {', '.join(others)}, which can run code when opened and so was not. "
            f"Convert it: load the folder with diffusers where you trust it, and save_pretrained "
            f"it again"
            if others
            else ""
        )
    )


def _weight_file(folder: Path, stem: str) -> Path | None:
    """The file that holds a part's weights, or the index of those that do."""
    for variant in _VARIANTS:
        for name in (f"{stem}{variant}.safetensors", f"{stem}.safetensors{_INDEX}{variant}.json"):
            if os.path.isfile(folder / name):
                return folder / name
    return None


def _parts(file: Path) -> list[Path]:
    index = f".safetensors{_INDEX}" in file.name and file.name.endswith(".json")
    return shards(file) if index else [file]


def shards(index: Path) -> list[Path]:
    """The files that an index names, all of which are there, beside it."""
    try:
        with opened(index) as file:
            text = file.read(_LARGEST_INDEX)
        names = sorted({str(name) for name in read_json(text.decode())["weight_map"].values()})
    except (UnreadableFileError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConceptFileError(
            f"{index.name} is no index of a model in several files ({type(error).__name__}: "
            f"{error}). Copy it again, or give the model as one .safetensors."
        ) from error
    outside = next((name for name in names if PureWindowsPath(name).name != name), None)
    if outside is not None:
        raise ConceptFileError(
            f"{index.name} names the file {outside!r}; all parts of a model lie in the folder of "
            f"its index, and nothing else is opened. Take the index from the model's own folder."
        )
    missing = [name for name in names if not os.path.isfile(index.parent / name)]
    if missing:
        raise ConceptFileError(
            f"{len(missing)} of the {len(names)} files that {index.name} names are not beside it, "
            f"{missing[0]} for one. Copy the missing ones into {index.parent}."
        )
    return [index.parent / name for name in names]


def read_cross_attention(file: Path) -> dict[str, Tensor]:
    """The matrices of cross-attention in a .safetensors, (out, in), by their names there."""
    try:
        weights, _ = read_tensors(file, lambda name: bool(layer_of(name.removesuffix(".weight"))))
    except UnreadableFileError as error:
        raise ConceptFileError(
            f"{file.name} cannot be read as a .safetensors checkpoint ({error.reason}). Give the "
            "whole model as .safetensors: copy or download it again, or convert it."
        ) from error
    odd = next((name for name, weight in weights.items() if weight.ndim != 2), None)
    if odd is not None:
        raise ConceptFileError(
            f"{file.name} holds {odd} of shape {tuple(weights[odd].shape)}; a matrix is needed. "
            f"Give an ordinary checkpoint."
        )
    return weights
