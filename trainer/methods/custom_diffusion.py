"""Custom Diffusion (Kumari et al., CVPR 2023): keys, values and the modifier token."""

from ..config import TrainConfig
from ..learning.projections import DenseProjections
from .method import Method

METHOD = Method(
    description="keys and values of cross-attention, and the trigger word",
    projections=lambda denoiser, earlier, config: DenseProjections(denoiser, earlier),
    steps=TrainConfig.steps,
    learning_rate=TrainConfig.learning_rate,
    splices=True,
)
