"""Values and the trigger word learn, keys stay: changed keys move where other words look, so
concepts that share a picture mix (ConceptSplit, arXiv 2510.04668, ICCV 2025).
"""

from ..learning.value_projections import ValueProjections
from .method import Method

METHOD = Method(
    description="values of cross-attention alone, and the trigger word",
    projections=lambda denoiser, earlier, config: ValueProjections(denoiser, earlier),
    steps=250,
    learning_rate=8e-5,
    splices=True,
)
