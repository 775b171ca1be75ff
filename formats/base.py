"""The base model of a file that holds whole weights: what they are compared with, and added to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..concept.concept import hash_projections
from ..concept.errors import ConceptFileError, IncompatibleModelError
from ..concept.layers import Family, family_of_width, is_projection
from .names import layer_of

_FARTHEST = 0.5
"""Relative change above which weights are of another base. Custom Diffusion moves keys and values
by a few per cent; unrelated weights differ by more than their own norm."""


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

    def changes(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole matrices minus the base's, in float32.

        Raises IncompatibleModelError where layers or shapes differ, and where the weights are so
        far from the base that they must belong to another one.
        """
        for layer, weight in whole.items():
            own = self.weights.get(layer)
            if own is None or own.shape != weight.shape:
                shape = "absent" if own is None else tuple(own.shape)
                raise IncompatibleModelError(
                    f"{layer} is {tuple(weight.shape)} in the file and {shape} in the base model, "
                    f"{self.family.title}. Give the model that the file was trained on."
                )
        changes = {k: w.float() - self.weights[k].to("cpu").float() for k, w in whole.items()}
        norm = torch.stack([self.weights[k].float().norm().cpu() for k in whole]).norm()
        moved = float(torch.stack([c.norm() for c in changes.values()]).norm() / norm)
        if not moved <= _FARTHEST:
            raise IncompatibleModelError(
                f"The weights in the file differ from the base model given by {moved:.0%} of their "
                f"norm; training moves them by a few per cent. They were trained on another base "
                f"model: give that one."
            )
        return changes


def read_base(path: Path) -> BaseModel:
    """The base from a checkpoint (.safetensors, original or diffusers' layout), or from a folder in
    diffusers' layout. Only its cross-attention is read.
    """
    if path.is_dir():
        unet = path / "unet" if (path / "unet").is_dir() else path
        file = unet / "diffusion_pytorch_model.safetensors"
    else:
        file = path
    if not file.is_file():
        raise ConceptFileError(
            f"There is no base model {file}. Give a checkpoint as .safetensors, or a folder in "
            "diffusers' layout."
        )
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            names = [n for n in opened.keys() if layer_of(n.removesuffix(".weight"))]  # noqa: SIM118
            base = BaseModel.of((name, opened.get_tensor(name)) for name in names)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConceptFileError(
            f"{file.name} cannot be read as a .safetensors checkpoint ({error}). Copy it again, or "
            "convert it to .safetensors."
        ) from error
    _ = base.family  # a checkpoint without cross-attention is refused here
    return base
