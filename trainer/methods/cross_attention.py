"""All of cross-attention: queries and outputs as well as keys, values and the modifier token.

The larger choice in the reference's own training script. Biases stay as they are.
"""

from ...diffusion.protocols import Denoiser
from ..learning.projections import DenseProjections
from .method import Method


def queries_and_outputs(denoiser: Denoiser) -> dict[str, str]:
    return {
        layer.removesuffix("to_k") + part: path.removesuffix("to_k") + f"{part}.weight"
        for layer, path in denoiser.projections.items()
        if layer.endswith("to_k")
        for part in ("to_q", "to_out.0")
    }


METHOD = Method(
    description="all of cross-attention, and the trigger word",
    projections=lambda denoiser, earlier, config: DenseProjections(denoiser, earlier),
    steps=250,
    learning_rate=8e-5,
    further_layers=queries_and_outputs,
)
