"""A prior without pictures: at the noisy latents of a step the class prompt is held to what the
network itself predicts for it (as OneTrainer and SimpleTuner have it; Kumari et al. keep the class
by pictures).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from .prompt_features import PromptText, lengthened
from .samples import Samples


def class_prompts(prompts: Sequence[str], tokens: Sequence[str]) -> list[str]:
    """The same prompts without trigger words: `photo of a <new1> cat` → `photo of a cat`."""
    found = []
    for prompt in prompts:
        for token in tokens:
            prompt = prompt.replace(token, " ") if token else prompt
        found.append(" ".join(prompt.split()))
    return found


def with_class_prior(samples: Samples, text: PromptText, weight: float, count: int) -> Samples:
    """A step's samples and behind them the first `count` of them once more, with their class
    prompts' text; `weight` times the mean of their losses is added to the step's.
    """
    context = text.features.context
    rows = math.lcm(samples.context.shape[1], context.shape[1])  # a class prompt may be shorter
    samples = samples.lengthened(rows)
    first = samples[:count]
    again = replace(
        first,
        context=lengthened(context, rows),
        pooled=text.features.pooled,
        passing=None if text.passing is None else lengthened(text.passing, rows),
        masks_bhw=torch.ones_like(first.masks_bhw),
        weights=torch.full_like(first.weights, weight / count),
        word_rows=None if first.word_rows is None else torch.zeros_like(first.word_rows),
        imitates=torch.ones(count, dtype=torch.bool),
    )
    own = replace(samples, imitates=torch.zeros(len(samples), dtype=torch.bool))
    names = [name for name, value in vars(own).items() if value is not None]
    return replace(
        own, **{name: torch.cat([getattr(own, name), getattr(again, name)]) for name in names}
    )
