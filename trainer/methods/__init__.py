"""The training methods, by the names that users choose them by."""

from collections.abc import Mapping

from ..config import MethodName, TrainConfig
from . import (
    cross_attention,
    custom_diffusion,
    dreambooth,
    fine_tune_all,
    low_rank,
    textual_inversion,
)
from .method import Method

METHODS: Mapping[MethodName, Method] = {
    "custom diffusion": custom_diffusion.METHOD,
    "low-rank": low_rank.METHOD,
    "cross-attention": cross_attention.METHOD,
    "textual inversion": textual_inversion.METHOD,
    "dreambooth": dreambooth.METHOD,
    "fine-tune all": fine_tune_all.METHOD,
}


def recipe(name: MethodName) -> TrainConfig:
    """The settings a method is published with."""
    method = METHODS[name]
    return TrainConfig(method=name, steps=method.steps, learning_rate=method.learning_rate)
