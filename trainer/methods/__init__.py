"""The training methods, by the names that users choose them by."""

from collections.abc import Mapping

from ...concept.concept import Concept
from ..config import GradientCut, MethodName, TrainConfig
from . import (
    cross_attention,
    custom_diffusion,
    dreambooth,
    fine_tune_all,
    low_rank,
    textual_inversion,
    values_only,
)
from .method import Method

METHODS: Mapping[MethodName, Method] = {
    "custom diffusion": custom_diffusion.METHOD,
    "values only": values_only.METHOD,
    "low-rank": low_rank.METHOD,
    "cross-attention": cross_attention.METHOD,
    "textual inversion": textual_inversion.METHOD,
    "dreambooth": dreambooth.METHOD,
    "fine-tune all": fine_tune_all.METHOD,
}


def gradient_cut(config: TrainConfig, earlier: Concept | None) -> GradientCut:
    """Where a run cuts: as `config` says where its method can, and as the concept was taught that
    it goes on from, whose words all mean something.
    """
    goes_on = earlier is not None and bool(earlier.deltas) and earlier.scope == "every word"
    if config.gradient_cut == "own words" and (goes_on or not METHODS[config.method].splices):
        return "start and padding"
    return config.gradient_cut


def recipe(name: MethodName) -> TrainConfig:
    """The settings a method is published with."""
    method = METHODS[name]
    return TrainConfig(method=name, steps=method.steps, learning_rate=method.learning_rate)
