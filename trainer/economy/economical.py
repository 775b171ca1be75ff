"""All that makes training a network faster or smaller, and changes no result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...diffusion.protocols import Denoiser
from .casts import casting_each_pass
from .frozen_layers import keeping_less
from .layout import fastest_for


@contextmanager
def economical(denoiser: Denoiser, resolution: int) -> Iterator[None]:
    """While the context lasts; to be entered when what learns is in the network already."""
    with (
        fastest_for(denoiser, resolution),
        casting_each_pass(denoiser),
        keeping_less(denoiser.network),
    ):
        yield
