"""Textual Inversion (Gal et al., ICLR 2023): only the trigger word learns."""

from ..learning.projections import FrozenProjections
from .method import Method

METHOD = Method(
    description="only the trigger word",
    projections=lambda denoiser, earlier, config: FrozenProjections(denoiser, earlier),
    steps=3000,
    learning_rate=2e-3,
)
