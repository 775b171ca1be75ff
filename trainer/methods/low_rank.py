"""Custom Diffusion through low-rank factors (LoRA, Hu et al. 2022): small from the start."""

from ..learning.projections import LowRankProjections
from .method import Method

METHOD = Method(
    description="low-rank factors on keys and values, and the trigger word",
    projections=lambda denoiser, earlier, config: LowRankProjections(
        denoiser, earlier, config.rank, config.seed
    ),
    steps=250,
    learning_rate=1e-4,
    splices=True,
)
