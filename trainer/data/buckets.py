"""Aspect buckets: the sizes that views may have, so that pictures keep their shape.

A network needs the pictures of a step side by side, so all of them have one size. Sizes of about
the same area, sides on a grid that every UNet of Stable Diffusion halves without a rest, serve all
shapes: a picture takes the nearest, and loses no more than it is away from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

Frame = tuple[int, int]
"""Width and height of a view, in pixels"""

GRID = 64  # pixels
LONGEST = 4
"""Sides of the longest bucket; of a longer picture only the middle is seen."""
# Podell et al. 2023, "SDXL", appendix I: what that model was trained at. The upright ones; the
# others lie on their side.
_SDXL_EDGE = 1024
_SDXL_UPRIGHT: tuple[Frame, ...] = (
    *((512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664)),
    *((640, 1600), (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280)),
    *((832, 1216), (832, 1152), (896, 1152), (896, 1088), (960, 1088), (960, 1024)),
)


@lru_cache(maxsize=8)
def buckets(resolution: int) -> tuple[Frame, ...]:
    """The sizes for pictures of about resolution² pixels, from upright to wide: SDXL's own at 1024,
    else all on the grid that are no larger, and the square.
    """
    if resolution == _SDXL_EDGE:
        upright: Sequence[Frame] = _SDXL_UPRIGHT
    else:
        longest = int(resolution * math.sqrt(LONGEST))
        heights = range(GRID, longest + 1, GRID)
        whole = [(resolution**2 // height // GRID * GRID, height) for height in heights]
        upright = [(w, h) for w, h in whole if 0 < w < h <= LONGEST * w]
    frames = {(resolution, resolution), *upright, *((h, w) for w, h in upright)}
    return tuple(sorted(frames, key=_shape))


def bucket_for(width: int, height: int, resolution: int) -> Frame:
    """The size that is nearest in shape, measured as a ratio of ratios; of two the larger."""
    shape = _shape((width, height))
    return min(buckets(resolution), key=lambda f: (abs(_shape(f) - shape), -f[0] * f[1]))


def shared_out(sizes: Sequence[Frame], frames: Mapping[Frame, int]) -> list[tuple[int, Frame]]:
    """Which picture is cut to which frame, where others have said which frames there are: places
    among `sizes`, and frames.

    Every frame gets about as many pictures as its count asks for, at least one, and of those the
    ones that lose least: the most upright pictures for the most upright frames. A picture may be
    cut to two.
    """
    places = sorted(range(len(sizes)), key=lambda place: _shape(sizes[place]))
    total, before = sum(frames.values()), 0
    shared = []
    for frame in sorted(frames, key=lambda frame: (_shape(frame), frame)):
        start = min(len(places) * before // total, len(places) - 1)
        before += frames[frame]
        end = max(len(places) * before // total, start + 1)
        shared += [(place, frame) for place in places[start:end]]
    return sorted(shared, key=lambda pair: pair[0])


def _shape(frame: Frame) -> float:
    """0 for a square, the same for two that one lies on the side of the other, but for the sign."""
    width, height = frame
    return math.log(width / height)
