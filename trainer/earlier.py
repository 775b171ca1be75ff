"""Whether a training can go on from a concept that was learnt before."""

from ..concept.concept import Concept
from ..concept.errors import ConfigError, IncompatibleModelError
from ..concept.fit import check_fit
from ..concept.layers import is_projection
from ..diffusion.protocols import Denoiser
from .config import TrainConfig
from .learning.projections import base_hash, low_rank_factors
from .methods import METHODS


def check_earlier(earlier: Concept, denoiser: Denoiser, config: TrainConfig) -> None:
    """Raises IncompatibleModelError for a concept of another model, ConfigError for one that the
    method cannot go on from.
    """
    further_layers = METHODS[config.method].further_layers(denoiser)
    beyond = [
        layer for layer in earlier.layers if not (is_projection(layer) or layer in further_layers)
    ]
    if beyond:
        raise ConfigError(
            f"The concept to extend, {earlier.describe()}, changes queries and outputs of "
            f"cross-attention too ({beyond[0]} for one). Use the method 'cross-attention'."
        )
    if config.method == "low-rank":
        for layer in filter(is_projection, earlier.layers):
            low_rank_factors(earlier.deltas[layer], layer, config.rank)
    names = {layer: f"{path}.weight" for layer, path in denoiser.projections.items()}
    shapes = {
        layer: tuple(denoiser.network.get_parameter(name).shape)
        for layer, name in (names | dict(further_layers)).items()
    }
    check_fit(earlier, denoiser.family, shapes)
    if earlier.base_hash and earlier.base_hash != base_hash(denoiser):
        raise IncompatibleModelError(
            f"The concept to extend, {earlier.describe()}, was trained on another checkpoint of "
            f"{earlier.family.title} (base hash {earlier.base_hash[:8]}). Load the checkpoint it "
            f"was trained on, or train from nothing."
        )
