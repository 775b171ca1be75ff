"""Recorded attention, judged by diffusers' own attention scores, added up in a plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from custom_diffusion.attention.drawing import advice, attention_sheet, overlap_table
from custom_diffusion.attention.maps import (
    MOST_WORDS,
    PARTS,
    AttentionError,
    AttentionMaps,
    AttentionRecorder,
    WatchedWord,
    overlap,
)
from custom_diffusion.host.diffusers.attention import watched_words, watching
from custom_diffusion.host.diffusers.lending import text_encoder
from custom_diffusion.host.diffusers.sampling import sample
from support.made_concepts import concept_for
from support.tiny_models import tiny_pipeline
from torch import Tensor

STEPS = 4
Seen = list[tuple[int, Tensor]]
"""(step, shares (b, places, words of the prompt)) of every cross-attention, in their order"""


@contextmanager
def scores_by_diffusers(pipeline: Any, seen: Seen) -> Iterator[None]:
    """Every cross-attention as diffusers computes it without a fused kernel."""
    step = -1

    def counts(module: Any, args: Any, named: Any) -> None:
        nonlocal step
        step += 1

    def forward(attn: Any, x: Tensor, encoder_hidden_states: Tensor, **others: Any) -> Tensor:
        q, k, v = (
            attn.head_to_batch_dim(part)
            for part in (
                attn.to_q(x),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
        shares = attn.get_attention_scores(q, k)
        seen.append((step, shares.unflatten(0, (len(x), -1)).mean(1)))
        return attn.to_out[0](attn.batch_to_head_dim(shares @ v))

    handle = pipeline.unet.register_forward_pre_hook(counts, with_kwargs=True)
    modules = [m for n, m in pipeline.unet.named_modules() if n.endswith(".attn2")]
    for module in modules:
        module.forward = partial(forward, module)
    try:
        yield
    finally:
        handle.remove()
        for module in modules:
            del module.forward


def by_hand(seen: Seen, batch: int, steps: range, columns: list[list[int]]) -> dict[int, Tensor]:
    """Places of a level → mean (b, words, places) over its layers and these steps."""
    levels: dict[int, list[Tensor]] = {}
    for step, shares in seen:
        if step in steps:
            words = [shares[:batch, :, own].sum(-1) for own in columns]
            levels.setdefault(shares.shape[1], []).append(torch.stack(words, 1))
    return {places: torch.stack(found).mean(0) for places, found in levels.items()}


@pytest.mark.parametrize(("start", "end", "steps"), [(0, 1, range(4)), (0.5, 0.75, range(2, 3))])
def test_maps_are_the_scores_of_attention(start: float, end: float, steps: range) -> None:
    pipeline = tiny_pipeline()
    cat = concept_for(pipeline, "<new1>", "cat", 1)
    prompt = "photo of a (<new1> cat:1.3) and a dog"
    encoder = text_encoder(pipeline).with_tokens(cat.embeddings())
    words = watched_words(encoder, prompt, ["<new1> cat", "dog"])
    assert [list(word.positions) for word in words] == [[4, 5], [8]]
    how = {"resolution": 64, "steps": STEPS, "seeds": [3, 4]}
    seen: Seen = []
    with scores_by_diffusers(pipeline, seen):
        wanted = sample(pipeline, [prompt] * 2, cat, **how)
    with watching(pipeline, words) as recorder:
        ours = sample(pipeline, [prompt] * 2, cat, **how)
    assert torch.allclose(ours, wanted, atol=1e-5)  # what is watched is drawn as ever

    maps = recorder.maps()
    hand = by_hand(seen, 2, steps, [[4, 5], [8]])
    assert len(hand) > 1
    for (h, w), mean in maps.means.items():
        assert mean.shape == (PARTS, 2, 2, h, w)
        halvings = {8: 0, 4: 1, 2: 2, 1: 3}[h]
        found = maps.between(start, end, halvings)
        assert torch.allclose(found.flatten(2), hand[h * w], atol=1e-6)
    finest = max(maps.means)
    assert maps.between(start, end).shape == (2, 2, *finest)
    assert torch.equal(sample(pipeline, [prompt] * 2, cat, **how), ours)  # no hook stays


def test_columns_of_all_words_add_up_to_one() -> None:
    pipeline = tiny_pipeline()
    every = [WatchedWord("all", range(77)), WatchedWord("start", [0])]
    with watching(pipeline, every) as recorder:
        sample(pipeline, ["a cat"], resolution=64, steps=2)
    whole = recorder.maps().between()[:, 0]
    assert torch.allclose(whole, torch.ones_like(whole), atol=1e-5)


def blob(x: float, y: float, edge: int = 16) -> Tensor:
    points = (torch.arange(edge) + 0.5) / edge
    return torch.exp(-((points[None] - x) ** 2 + (points[:, None] - y) ** 2) / 0.01)


def test_overlap_says_whether_words_look_at_the_same_place() -> None:
    left, right = blob(0.25, 0.5), blob(0.75, 0.5)
    assert overlap(left, 3 * left + 0.7) == pytest.approx(1, abs=1e-5)
    assert overlap(left, right) < 0.01
    assert 0.1 < overlap(left, blob(0.35, 0.5)) < 0.8
    assert overlap(left, torch.ones(16, 16)) == 0  # a word that looks nowhere
    maps = torch.stack([left, 2 * left, right])[None]
    table = overlap_table(maps, ["<new1> cat", "<new2> dog", "snow"])
    assert table[0] == ("<new1> cat / <new2> dog", "1.00", "the same place")
    assert [row[2] for row in table[1:]] == ["apart", "apart"]
    (told,) = advice(maps, ["<new1> cat", "<new2> dog", "snow"])
    assert "<new1> cat and <new2> dog look at the same place" in told and "Apply Regions" in told


def test_the_sheet_shows_where_a_word_looks() -> None:
    maps = torch.stack([blob(0.25, 0.25), blob(0.75, 0.75)])[None]
    sheet = attention_sheet(torch.full((1, 64, 96, 3), 0.5), maps, ["cat", "dog"])
    brightness = torch.tensor(list(sheet.convert("L").tobytes())).view(sheet.height, sheet.width)
    tile = 256 + 6
    cat, dog = (brightness[:262, 40 + tile * n : 40 + tile * n + 256] for n in (1, 2))

    def brightest(part: Tensor) -> tuple[int, int]:
        inside = part[6 + 45 : 6 + 210].clone()
        inside[inside > 250] = 0  # the paper beside a picture that is not square
        return divmod(int(inside.argmax()), part.shape[1])

    assert brightest(cat)[1] < 128 < brightest(dog)[1]
    assert brightest(cat)[0] < brightest(dog)[0]


def test_what_cannot_be_watched_or_shown() -> None:
    pipeline = tiny_pipeline()
    encoder = text_encoder(pipeline)
    with pytest.raises(AttentionError, match="'dog' is not in the prompt 'a cat'"):
        watched_words(encoder, "a cat", ["dog"])
    with pytest.raises(AttentionError, match="17 words are watched; 1 to 16"):
        AttentionRecorder([WatchedWord("cat", [1])] * (MOST_WORDS + 1))
    with pytest.raises(AttentionError, match="No attention was recorded"):
        AttentionRecorder([WatchedWord("cat", [1])]).maps()
    two = torch.rand(2, 1, 4, 4)
    with pytest.raises(AttentionError, match="3 pictures were given, and the last sampling drew 2"):
        attention_sheet(torch.rand(3, 8, 8, 3), two, ["cat"])
    counts = torch.zeros(PARTS)
    counts[0] = 1
    maps = AttentionMaps(["cat"], {(4, 4): torch.rand(PARTS, 1, 1, 4, 4)}, {(4, 4): counts}, (8, 8))
    assert maps.between(0, 0.01).shape == (1, 1, 4, 4)
    with pytest.raises(AttentionError, match=r"No step lies between 0\.5 and 1"):
        maps.between(0.5, 1)
    with pytest.raises(AttentionError, match="it looks at 4 x 4 places"):
        maps.between(0, 1, halvings=0)
