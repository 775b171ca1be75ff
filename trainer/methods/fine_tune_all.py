"""The ablation of Custom Diffusion's Table 3: its data and losses, but the whole UNet learns."""

from ..learning.projections import DenseProjections
from .method import Method

METHOD = Method(
    description="the whole UNet, and the trigger word",
    projections=lambda denoiser, earlier, config: DenseProjections(denoiser, earlier),
    steps=250,
    learning_rate=8e-6,
    whole_network=True,
)
