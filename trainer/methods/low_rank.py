"""Custom Diffusion through low-rank factors (LoRA, Hu et al. 2022): small from the start."""

from collections.abc import Mapping

from ...concept.delta import Delta
from ...diffusion.protocols import Denoiser
from ..config import TrainConfig
from ..learning.disjoint_bases import DisjointProjections
from ..learning.projections import LowRankProjections
from .method import Method


def _projections(
    denoiser: Denoiser, earlier: Mapping[str, Delta], config: TrainConfig
) -> LowRankProjections:
    if config.basis:
        return DisjointProjections(denoiser, earlier, config.rank, config.seed, config.basis)
    return LowRankProjections(denoiser, earlier, config.rank, config.seed)


METHOD = Method(
    description="low-rank factors on keys and values, and the trigger word",
    projections=_projections,
    steps=250,
    learning_rate=1e-4,
    splices=True,
)
