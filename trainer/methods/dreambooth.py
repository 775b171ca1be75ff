"""DreamBooth (Ruiz et al., CVPR 2023): the whole UNet learns, a rare word names the thing."""

from ..learning.projections import DenseProjections
from .method import Method

METHOD = Method(
    description="the whole UNet; the trigger word stays a rare one",
    projections=lambda denoiser, earlier, config: DenseProjections(denoiser, earlier),
    steps=800,
    learning_rate=5e-6,
    learns_words=False,
    whole_network=True,
)
