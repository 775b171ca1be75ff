"""Pretrains the miniature's text encoder: which word belongs to which object.

Stable Diffusion's text encoder has learnt from captioned pictures before any picture is drawn. The
miniature's learns, in minutes, to answer questions about captions. The linear readers that give the
answers are thrown away afterwards.
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
    COLORS,
    MARKS,
    PATTERNS,
    PLACES,
    RELATIONS,
    SHAPES,
    captioned_scene,
    vocabulary,
)

WORD_STEPS, _BATCH_SIZE, _LEARNING_RATE = 3000, 64, 1e-3
EMPTY_CAPTIONS = 0.1  # share of captions left out, for guidance
# Share of captions in which a meaningless piece stands before a noun, as a name does. A noun's
# features must tell which: as in CLIP a rare word changes them, and a modifier token has a way in.
NAMED, NAMED_IN_WORDS, NAME_WEIGHT = 0.1, 0.3, 0.1
_ABSENT = "absent"
_OF_A_NOUN = {
    "shape": SHAPES,
    "color": ("", *COLORS),
    "second_color": ("", *COLORS),
    "pattern": ("", *PATTERNS),
    "mark": ("", *MARKS[1:]),
    "order": ("first", "second"),
}
"""Questions about the noun that is read, and their answers."""
_OF_A_CAPTION = {
    "background": ("", *BACKGROUNDS),
    "place": ("", *PLACES, *RELATIONS),
    **{shape: (_ABSENT, "", *COLORS) for shape in SHAPES},
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
        meaningless = _meaningless(tokenizer)
        name_reader = nn.Linear(text_encoder.config.hidden_size, 1 + len(meaningless))
    name_numbers = torch.zeros(len(tokenizer), dtype=torch.long)  # 0 for what is no name
    name_numbers[meaningless] = 1 + torch.arange(len(meaningless))
    parts = (text_encoder, of_nouns, of_captions, name_reader)
    weights = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=_LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, steps)
    for _ in range(steps):
        captions = [thinned(captioned_scene(rng)[1], rng) for _ in range(_BATCH_SIZE)]
        facts = [Facts.of(caption) for caption in captions]
        token_ids = padded_ids(tokenizer, captions, rng, NAMED_IN_WORDS)
        features = text_encoder(token_ids).last_hidden_state
        ends = (token_ids == tokenizer.eos_token_id).int().argmax(1)
        later = torch.tensor([rng.randrange(end, CONTEXT_LENGTH) for end in ends.tolist()])
        of_all = [
            {"background": fact.background, "place": fact.place}
            | dict.fromkeys(SHAPES, _ABSENT)
            | {said.shape: said.color for said in fact.objects}
            for fact in facts
        ]
        rows, at_nouns = torch.arange(len(ends)), torch.isin(token_ids, nouns)
        before_nouns = token_ids.roll(1, 1)[at_nouns]
        loss = of_nouns.loss(
            features[at_nouns],
            [
                vars(said) | {"order": order}
                for fact in facts
                for said, order in zip(fact.objects, _OF_A_NOUN["order"], strict=False)
            ],
        )
        loss += of_captions.loss(
            torch.cat([features[rows, ends], features[rows, later]]), 2 * of_all
        )
        names = name_reader(features[at_nouns])
        loss += NAME_WEIGHT * F.cross_entropy(names, name_numbers[before_nouns])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def thinned(caption: str, rng: random.Random) -> str:
    """The caption, or now and then nothing."""
    return "" if rng.random() < EMPTY_CAPTIONS else caption


def padded_ids(
    tokenizer: Any, captions: Sequence[str], rng: random.Random, named: float = NAMED
) -> Tensor:
    """Token ids (b, n) as the model is given them; a share of them with a name before a noun."""
    nouns = {tokenizer(shape)["input_ids"][1] for shape in SHAPES}
    rows = []
    for caption in captions:
        start, *words, end = tokenizer(caption)["input_ids"]
        if words and rng.random() < named:
            place = rng.choice([place for place, word in enumerate(words) if word in nouns])
            words.insert(place, rng.choice(_meaningless(tokenizer)))
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
