"""What a feature model must offer, and the features of many pictures, a batch in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..concept.errors import DataError, IncompatibleModelError

WORD = 320
"""The id of `a` in the vocabulary that every CLIP has"""
_BATCH_SIZE, _BATCH_PIXELS = 16, 4_000_000
_EDGE = 1024
"""Photographs are reduced to about this before a model, which reads 224 pixels, scales them."""


@dataclass(frozen=True)
class Judge:
    """A model that says in numbers what is in a picture, and as a rule in a text as well."""

    name: str
    """With its weights' fingerprint, where one model can have several"""
    image_features: Callable[[Tensor], Tensor]
    """Pictures (b, h, w, 3) in 0..1 → (b, d)"""
    text_features: Callable[[Sequence[str]], Tensor] | None = None
    """n texts → (n, d), of the same space; None for a model that reads no text"""
    word: Tensor | None = None
    """Its embedding (d,) of `WORD`, by which its text encoder is known again"""
    remarks: tuple[str, ...] = ()
    """What users should know of it, a sentence each"""

    def compared_with(self, encoder_words: Iterable[Tensor]) -> Judge:
        """The same, with a remark where it reads with a text encoder that the concept was trained
        with; these are its embeddings of `WORD`.
        """
        words = [word.reshape(-1).float().cpu() for word in encoder_words]
        if self.word is None or not any(_same(self.word, word) for word in words):
            return self
        remark = (
            "The judge reads prompts with the text encoder of the model that it judges, so it is "
            "pleased more easily by what that model draws. Take another CLIP for publication."
        )
        return replace(self, remarks=(*self.remarks, remark))


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
        smaller = max(1, min(picture.size) // _EDGE)
        one = torch.from_numpy(np.array(picture.convert("RGB").reduce(smaller)))
        full = len(batch) == _BATCH_SIZE or (len(batch) + 1) * one.numel() > 3 * _BATCH_PIXELS
        if batch and (full or batch[0].shape != one.shape):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _same(word: Tensor, other: Tensor) -> bool:
    """Up to what half precision rounds."""
    return word.shape == other.shape and bool((word - other).norm() <= 1e-2 * word.norm())


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
