"""What a training method is: which parts learn, and how fast where nothing else is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...concept.delta import Delta
from ...diffusion.protocols import Denoiser
from ..config import TrainConfig
from ..learning.projections import KeyValueProjections


def no_more(denoiser: Denoiser) -> Mapping[str, str]:
    return {}


@dataclass(frozen=True)
class Method:
    """Parts of the model that learn. Everything else about a training is the same for all."""

    description: str
    projections: Callable[[Denoiser, Mapping[str, Delta], TrainConfig], KeyValueProjections]
    """Keys and values of cross-attention and how they learn, from what was learnt before."""
    steps: int
    learning_rate: float
    """As published, for 8 pictures a step."""
    splices: bool = False
    """Whether keys and values can be taught at a concept's own words alone"""
    learns_words: bool = True
    """Whether the modifier token's embedding learns; otherwise it stays where it starts."""
    further_layers: Callable[[Denoiser], Mapping[str, str]] = no_more
    """Other layers that learn and go into the concept → names of their weights in the network."""
    whole_network: bool = False
    """Whether everything else in the UNet learns too. That fits no concept and stays in it."""

    @property
    def leaves_network_frozen(self) -> bool:
        """Whether nothing but keys, values and words learns."""
        return not self.whole_network and self.further_layers is no_more
