"""How the miniature is trained: from its seed alone, and with its attention shown the nouns."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.errors import IncompatibleModelError
from custom_diffusion.miniature.grounding import WatchedAttention, grounding_loss
from custom_diffusion.miniature.model import miniature_pipeline, untrained_pipeline
from custom_diffusion.miniature.pretrain import pretrain
from custom_diffusion.miniature.words import padded_ids
from custom_diffusion.miniature.world import SHAPES, Look, Placed, Scene
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

RED = (0.86, 0.12, 0.12)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What three short trainings leave: twice with seed 1, once with seed 2."""
    state = torch.get_rng_state()
    folders = [tmp_path_factory.mktemp("weights") / "new" for _ in range(3)]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        pretrain(folder, steps=3, word_steps=3, seed=seed)
    assert torch.equal(torch.get_rng_state(), state), "the process's random numbers are its own"
    return folders


@pytest.mark.any_version
def test_pretraining_depends_on_its_seed_alone(pretrained: list[Path]) -> None:
    one, same, other = (
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
        for folder in pretrained
    )
    assert one == same
    differ = {name for name in one if one[name] != other[name]}
    assert differ == {"unet.safetensors", "text_encoder.safetensors"}


@pytest.mark.any_version
def test_pretrained_files_are_small_and_hold_a_pipeline(pretrained: list[Path]) -> None:
    files = list(pretrained[0].iterdir())
    assert sum(file.stat().st_size for file in files) < 10_000_000, "they lie in the repository"
    for file in pretrained[0].glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    pipeline = miniature_pipeline(pretrained[0])
    pieces = json.loads((pretrained[0] / "vocab.json").read_text(encoding="utf-8"))
    assert len(pipeline.tokenizer) == len(pieces)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in pipeline.unet.parameters())


def test_missing_weights_are_named_with_a_way_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleModelError, match="miniature.pretrain") as caught:
        miniature_pipeline(tmp_path)
    assert str(tmp_path) in str(caught.value)


def watched_unet() -> tuple[Any, WatchedAttention]:
    unet = untrained_pipeline().unet.requires_grad_(False)
    attention = WatchedAttention()
    unet.set_attn_processor(attention)
    return unet, attention


def test_watched_attention_computes_what_diffusers_own_does() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 24, 24, generator=generator)
    context = torch.randn(2, 32, 128, generator=generator)
    unet, attention = watched_unet()
    for attention.watching in (False, True):
        watched = unet(latents, 500, encoder_hidden_states=context).sample
        assert len(attention.shares) == (11 if attention.watching else 0)
    shares = attention.take_shares()
    assert attention.shares == []
    assert {tuple(layer.shape) for layer in shares} == {(2, 144, 32), (2, 36, 32)}
    for layer in shares:
        torch.testing.assert_close(layer.sum(-1), torch.ones(layer.shape[:2]))
    unet.set_attn_processor(AttnProcessor2_0())
    fused = unet(latents, 500, encoder_hidden_states=context).sample
    torch.testing.assert_close(watched, fused, rtol=1e-4, atol=1e-5)


def test_attention_of_an_object_to_its_noun_is_what_the_loss_rewards() -> None:
    """Position by position, by hand, on a picture of two objects and one that is not named."""
    look = Look("circle", RED)
    left, right = Placed(look, 0.25, 0.5, 0.2), Placed(Look("square", RED), 0.75, 0.5, 0.2)
    scenes = [Scene((left, right), "in fog"), Scene((left,), "in fog")]
    circle, square = 7, 8
    token_ids = torch.tensor([[0, circle, 1, square, 9, 9], [0, 1, 9, 9, 9, 9]])
    shares = torch.rand(2, 36, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)

    logs = []
    for placed, noun in ((left, 1), (right, 3)):
        for row in range(6):
            for column in range(6):
                x, y = (column + 0.5) / 6, (row + 0.5) / 6
                if math.hypot(x - placed.x, y - placed.y) < 0.75 * placed.radius:
                    logs.append(-math.log(shares[0, 6 * row + column, noun].item() + 1e-4))
    assert len(logs) == 4, "the two positions in the middle of each"
    loss = grounding_loss([shares, shares], scenes, token_ids, torch.tensor([circle, square]))
    assert loss.item() == pytest.approx(sum(logs) / len(logs))


def test_captions_are_padded_and_now_and_then_hold_a_name_before_a_noun() -> None:
    tokenizer = untrained_pipeline().tokenizer
    caption = "a red circle and a blue square"
    ids = padded_ids(tokenizer, [caption] * 500 + [""], random.Random(0))
    assert ids.shape == (501, 32)
    plain = tokenizer(caption, padding="max_length", max_length=32)["input_ids"]
    stray = [row for row in ids[:500].tolist() if row != plain]
    assert 25 < len(stray) < 75
    for row in stray:
        (extra,) = (i for i in range(1, 8) if [*row[:i], *row[i + 1 :], row[-1]] == plain)
        assert tokenizer.decode(row[extra]).strip() not in ("red", "blue", *SHAPES)
        assert tokenizer.decode(row[extra + 1]).strip() in ("circle", "square")
    empty = tokenizer("", padding="max_length", max_length=32)["input_ids"]
    assert ids[500].tolist() == empty
