"""Attention laid over the pictures that were drawn with it, and what two words' overlap means."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..pictures.sheet import Row, lay_out
from ..pictures.tensors import to_picture
from .maps import AttentionError, overlaps

_HEAT = torch.tensor([[0.0, 0.0, 0.1], [0.45, 0.05, 0.45], [0.95, 0.4, 0.15], [1.0, 0.95, 0.6]])
"""From no attention to the most; brightness rises too, for those who see no hues"""
_PICTURE_SHARE = 0.35
MOSTLY_THE_SAME = 0.6
"""Overlap from which two words are said to look at the same place (docs/attention.md)."""


def attention_sheet(images_bhwc: Tensor, maps: Tensor, words: Sequence[str]) -> Image.Image:
    """Each picture, and beside it the same under the attention of each word.

    `images_bhwc` are in 0..1, `maps` (b, words, h, w). Each word's colours go from its least to its
    most attention over all pictures. Raises AttentionError where the numbers of pictures differ.
    """
    if len(images_bhwc) != len(maps):
        raise AttentionError(
            f"{len(images_bhwc)} pictures were given, and the last sampling drew {len(maps)}. "
            "Connect the pictures that were drawn with this Watch Attention."
        )
    low, high = (maps.amin((0, 2, 3), keepdim=True), maps.amax((0, 2, 3), keepdim=True))
    heats = (maps - low) / (high - low).clamp(min=1e-12)
    rows = []
    for number, (image, heat) in enumerate(zip(images_bhwc, heats, strict=True), 1):
        under = F.interpolate(heat[None], image.shape[:2], mode="bilinear")[0].clamp(0, 1)
        shown = [image[..., :3], *(overlaid(image[..., :3], one) for one in under)]
        pictures = [to_picture(one) for one in shown]
        rows.append(Row(f"{number}", "", pictures, ("picture", *words)))
    return lay_out(rows, tile=256, label=40)


def overlaid(image_hwc: Tensor, heat: Tensor) -> Tensor:
    """A picture (h, w, 3) under its attention (h, w); both in 0..1."""
    place = heat * (len(_HEAT) - 1)
    below = place.long().clamp(max=len(_HEAT) - 2)
    colour = torch.lerp(_HEAT[below], _HEAT[below + 1], (place - below)[..., None])
    grey = image_hwc.mean(-1, keepdim=True)
    return (_PICTURE_SHARE * grey + (1 - _PICTURE_SHARE) * colour).clamp(0, 1)


def overlap_table(maps: Tensor, words: Sequence[str]) -> list[tuple[str, str, str]]:
    """A row for each two words: which, their overlap, and what it means."""
    found = sorted(overlaps(maps).items(), key=lambda item: -item[1])
    return [
        (f"{words[i]} / {words[j]}", f"{share:.2f}", "the same place" if same(share) else "apart")
        for (i, j), share in found
    ]


def advice(maps: Tensor, words: Sequence[str]) -> list[str]:
    """What to do about words that look at the same place."""
    return [
        f"{words[i]} and {words[j]} look at the same place (overlap {share:.2f}): they may be "
        "drawn as one, or take each other's looks. If the picture shows that, give each a place "
        "with Apply Regions."
        for (i, j), share in overlaps(maps).items()
        if same(share)
    ]


def same(share: float) -> bool:
    return share >= MOSTLY_THE_SAME
