"""A pivotal start: the word learns first, alone; everything else starts from what it has become.

After pivotal tuning (Roich et al., 2021, arXiv 2106.05744), as it is done for text-to-image models:
textual inversion (Gal et al. 2022), then a training of weights under that word, here as one run.
The word goes on learning in the second part. Its rate is `word_learning_rate` in both.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...concept.errors import ConfigError
from ..config import TrainConfig


def words_first(number: int, config: TrainConfig, others: Sequence[Tensor]) -> None:
    """Before step `number`, counted from 0: takes the gradients of what waits away, so that the
    optimiser passes it over, its decay and its moments too.
    """
    for parameter in others if number < config.word_steps else ():
        parameter.grad = None


def check_word_steps(config: TrainConfig, rows: Sequence[Tensor]) -> None:
    """Raises ConfigError where no word could learn first, or nothing after it."""
    if not config.word_steps:
        return
    if not rows:
        raise ConfigError(
            f"word_steps={config.word_steps} teaches the trigger word first, and here none learns: "
            f"give the concept a trigger word, choose another method than 'dreambooth', or set "
            f"word_steps to 0."
        )
    if config.word_steps >= config.steps and config.method != "textual inversion":
        raise ConfigError(
            f"word_steps={config.word_steps} leaves none of the {config.steps} steps for keys and "
            f"values. Train longer, or set fewer word_steps."
        )
