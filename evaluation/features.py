"""What a feature model must offer, and the features of many pictures, a batch in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..concept.errors import DataError, IncompatibleModelError

_BATCH_SIZE = 16


@dataclass(frozen=True)
class Judge:
    """A model that says in numbers what is in a picture, and as a rule in a text as well."""

    name: str
    """With its weights' fingerprint, where one model can have several"""
    image_features: Callable[[Tensor], Tensor]
    """Pictures (b, h, w, 3) in 0..1 → (b, d)"""
    text_features: Callable[[Sequence[str]], Tensor] | None = None
    """n texts → (n, d), of the same space; None for a model that reads no text"""
    remarks: tuple[str, ...] = ()
    """What users should know of it, a sentence each"""


@torch.no_grad()
def picture_features(
    judge: Judge,
    pictures: Iterable[Image.Image],
    on_picture: Callable[[], None] = lambda: None,
) -> Tensor:
    """Features (n, d) of length 1, float32 on the CPU: 3 kB a picture is all that stays.

    Pictures of any sizes. Raises DataError for features that are not finite.
    """
    parts: list[Tensor] = []
    for batch in _batches(pictures):
        found = judge.image_features(torch.stack(batch).float().div(255))
        parts.append(_unit(found, judge, f"pictures {_count(parts) + 1} and following"))
        for _ in batch:
            on_picture()
    return torch.cat(parts) if parts else torch.zeros(0, 0)


@torch.no_grad()
def text_features(judge: Judge, texts: Sequence[str], width: int) -> Tensor | None:
    """Features (n, d) of length 1; None where the judge reads no text.

    Raises IncompatibleModelError where they are not as wide as those of pictures.
    """
    if judge.text_features is None:
        return None
    found = judge.text_features(texts)
    if found.shape[1] != width:
        raise IncompatibleModelError(
            f"The features of texts have {found.shape[1]} numbers and those of pictures {width}, "
            f"so they belong to two models and cannot be compared. Take both halves of one CLIP: "
            f"for CLIP ViT-L/14, clip_vision_l and clip_l."
        )
    return _unit(found, judge, "the prompts")


def _batches(pictures: Iterable[Image.Image]) -> Iterator[list[Tensor]]:
    """Neighbours of one size, as (h, w, 3) in 0..255."""
    batch: list[Tensor] = []
    for picture in pictures:
        one = torch.from_numpy(np.array(picture.convert("RGB")))
        if batch and (len(batch) == _BATCH_SIZE or batch[0].shape != one.shape):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _unit(features: Tensor, judge: Judge, what: str) -> Tensor:
    features = features.detach().float().cpu()
    lengths = features.norm(dim=-1, keepdim=True)
    if not lengths.isfinite().all() or not (lengths > 0).all():
        raise DataError(
            f"{judge.name} makes features of {what} that are no finite numbers, or all zero: its "
            f"weights are broken, or overflow in half precision. Download it again, or load it in "
            f"float32."
        )
    unit: Tensor = features / lengths
    return unit


def _count(parts: Sequence[Tensor]) -> int:
    return sum(len(part) for part in parts)
