"""Pretrains the miniature's text encoder: which word belongs to which object.

Stable Diffusion's text encoder has learnt from captioned pictures before any picture is drawn. The
miniature's learns, in a minute, to answer questions about captions. The linear readers that give
the answers are thrown away afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .judge import Facts
from .world import BACKGROUNDS, NAMED_COLORS, PLACES, RELATIONS, SHAPES, captioned_scene

WORD_STEPS, _BATCH_SIZE, _LEARNING_RATE = 1000, 64, 1e-3
_ABSENT = "absent"
_OF_A_NOUN = {"color": ("", *NAMED_COLORS)}
"""Questions about the noun that is read, and their answers."""
_OF_A_CAPTION = {
    "background": ("", *BACKGROUNDS),
    "place": ("", *PLACES, *RELATIONS),
    **{shape: (_ABSENT, "", *NAMED_COLORS) for shape in SHAPES},
}
"""Questions about the whole caption, read from its end of text."""


def pretrain_words(text_encoder: Any, tokenizer: Any, steps: int, seed: int) -> None:
    """Trains `text_encoder` in place on captions of the world."""
    rng = random.Random(f"words {seed}")
    nouns = torch.tensor([tokenizer(shape)["input_ids"][1] for shape in SHAPES])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        of_nouns, of_captions = (
            _Reader(text_encoder.config.hidden_size, questions)
            for questions in (_OF_A_NOUN, _OF_A_CAPTION)
        )
    weights = [p for part in (text_encoder, of_nouns, of_captions) for p in part.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=_LEARNING_RATE, fused=True)
    for _ in range(steps):
        captions = [captioned_scene(rng)[1] for _ in range(_BATCH_SIZE)]
        facts = [Facts.of(caption) for caption in captions]
        token_ids = tokenizer(captions, padding=True, return_tensors="pt")["input_ids"]
        features = text_encoder(token_ids).last_hidden_state
        ends = (token_ids == tokenizer.eos_token_id).int().argmax(1)
        loss = of_nouns.loss(
            features[torch.isin(token_ids, nouns)],
            [{"color": color} for fact in facts for color in fact.colors],
        ) + of_captions.loss(
            features[torch.arange(len(ends)), ends],
            [
                {"background": fact.background, "place": fact.place}
                | dict.fromkeys(SHAPES, _ABSENT)
                | dict(zip(fact.shapes, fact.colors, strict=True))
                for fact in facts
            ],
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


class _Reader(nn.Module):
    """Answers questions with one linear map each."""

    def __init__(self, width: int, questions: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self._questions = questions
        self._maps = nn.ModuleDict(
            {name: nn.Linear(width, len(answers)) for name, answers in questions.items()}
        )

    def loss(self, features: Tensor, truth: Sequence[Mapping[str, str]]) -> Tensor:
        """Cross-entropy of the answers read from `features` (n, d), summed over the questions."""
        losses = [
            F.cross_entropy(
                self._maps[name](features), torch.tensor([answers.index(t[name]) for t in truth])
            )
            for name, answers in self._questions.items()
        ]
        return torch.stack(losses).sum()
