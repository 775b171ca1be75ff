"""Pictures as tensors and back: the one place.

A picture is (h, w, 3) in 0..1, as ComfyUI's are, or (h, w) where it is shades alone. Networks look
at (3, h, w) in -1..1.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_tensor(picture: Image.Image) -> Tensor:
    """(h, w, 3) of colours, (h, w) of shades, in 0..1, float32."""
    return _numbers(picture).div_(255)


def to_picture(image: Tensor) -> Image.Image:
    """Of (h, w, 3) or (h, w) in 0..1; what lies beyond is cut off."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def in_eight_bits(images: Tensor) -> Tensor:
    """What is left of images in 0..1 when they are kept as pictures."""
    return (images.clamp(0, 1) * 255).round() / 255


def for_network(picture: Image.Image) -> Tensor:
    """Colours as a network looks at them, (3, h, w) in -1..1, float32."""
    return to_chw(_numbers(picture)) / 127.5 - 1


def of_network(images: Tensor) -> Tensor:
    """(..., 3, h, w) in -1..1 → (..., h, w, 3) in 0..1, where nothing lies beyond."""
    return to_hwc(images) / 2 + 0.5


def to_chw(images: Tensor) -> Tensor:
    """(..., h, w, channels) → (..., channels, h, w)"""
    return images.movedim(-1, -3)


def to_hwc(images: Tensor) -> Tensor:
    """(..., channels, h, w) → (..., h, w, channels)"""
    return images.movedim(-3, -1)


def _numbers(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture, dtype=np.float32))
