"""The levels of a UNet: where in a picture each of a layer's places lies."""

from __future__ import annotations

from ..concept.errors import IncompatibleModelError


def level_of(places: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of the level that has so many places, of a UNet that is given latents of
    this size; each level halves, rounded up.

    Raises IncompatibleModelError where none has.
    """
    h, w = height, width
    while h * w > places and max(h, w) > 1:
        h, w = -(-h // 2), -(-w // 2)
    if h * w != places:
        raise IncompatibleModelError(
            f"This network looks at {places} places of a picture of {width} x {height} latents, "
            "which is no halving of it: which part of the picture each is cannot be known. "
            "Something that changes the size inside the network (HyperTile, a deep shrink) cannot "
            "be used with regions or while attention is watched."
        )
    return h, w
