"""Pretrains the miniature's text encoder: which word belongs to which object.

Stable Diffusion's text encoder has learnt from captioned pictures before any picture is drawn. The
miniature's learns, in a minute, to answer questions about captions. The linear readers that give
the answers are thrown away afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .judge import Facts
from .model import CONTEXT_LENGTH
from .world import (
    BACKGROUNDS,
    NAMED_COLORS,
    PLACES,
    RELATIONS,
    SHAPES,
    captioned_scene,
    vocabulary,
)

WORD_STEPS, _BATCH_SIZE, _LEARNING_RATE = 2000, 64, 1e-3
EMPTY_CAPTIONS = 0.1  # share of captions left out, for guidance
STRAY_WORDS = 0.1  # share of captions with a piece of a word that means nothing
_ABSENT = "absent"
_OF_A_NOUN = {
    "shape": SHAPES,
    "color": ("", *NAMED_COLORS),
    "order": ("first", "second"),
}
"""Questions about the noun that is read, and their answers."""
_OF_A_CAPTION = {
    "background": ("", *BACKGROUNDS),
    "place": ("", *PLACES, *RELATIONS),
    **{shape: (_ABSENT, "", *NAMED_COLORS) for shape in SHAPES},
}
"""Questions about the whole caption, read from its end of text and from the padding after it."""


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
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, steps)
    for _ in range(steps):
        captions = [thinned(captioned_scene(rng)[1], rng) for _ in range(_BATCH_SIZE)]
        facts = [Facts.of(caption) for caption in captions]
        token_ids = padded_ids(tokenizer, captions, rng)
        features = text_encoder(token_ids).last_hidden_state
        ends = (token_ids == tokenizer.eos_token_id).int().argmax(1)
        later = torch.tensor([rng.randrange(end, CONTEXT_LENGTH) for end in ends.tolist()])
        of_all = [
            {"background": fact.background, "place": fact.place}
            | dict.fromkeys(SHAPES, _ABSENT)
            | dict(zip(fact.shapes, fact.colors, strict=True))
            for fact in facts
        ]
        rows = torch.arange(len(ends))
        loss = of_nouns.loss(
            features[torch.isin(token_ids, nouns)],
            [
                {"shape": shape, "color": color, "order": order}
                for fact in facts
                for shape, color, order in zip(
                    fact.shapes, fact.colors, _OF_A_NOUN["order"], strict=False
                )
            ],
        ) + of_captions.loss(torch.cat([features[rows, ends], features[rows, later]]), 2 * of_all)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def thinned(caption: str, rng: random.Random) -> str:
    """The caption, or now and then nothing."""
    return "" if rng.random() < EMPTY_CAPTIONS else caption


def padded_ids(tokenizer: Any, captions: Sequence[str], rng: random.Random) -> Tensor:
    """Token ids (b, n) as the model is given them; now and then a meaningless piece among them."""
    rows = []
    for caption in captions:
        start, *words, end = tokenizer(caption)["input_ids"]
        if words and rng.random() < STRAY_WORDS:
            words.insert(rng.randrange(len(words)), rng.choice(_meaningless(tokenizer)))
        row = [start, *words[: CONTEXT_LENGTH - 2]]
        rows.append(row + [end] * (CONTEXT_LENGTH - len(row)))
    return torch.tensor(rows)


@cache
def _meaningless(tokenizer: Any) -> list[int]:
    """Ids of pieces that are no word of the world: rare words, letters."""
    known = {id for word in vocabulary() for id in tokenizer(word)["input_ids"]}
    return [id for id in range(tokenizer.bos_token_id) if id not in known]


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
