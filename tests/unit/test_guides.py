"""The guides for contributors, followed: their code is taken from the page, put where the page
says, and used.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.delta import DenseDelta
from custom_diffusion.concept.errors import MergeError, TokenError
from custom_diffusion.host.diffusers.lending import borrowed_models
from custom_diffusion.merge import merging
from custom_diffusion.trainer import methods
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.learning import projections
from custom_diffusion.trainer.loop import train
from custom_diffusion.trainer.methods.method import Method
from diffusers import StableDiffusionPipeline
from support.concepts import random_concept
from support.tiny_models import RESOLUTION, cat_concept, random_bank

pytestmark = pytest.mark.any_version

DOCS = Path(__file__).resolve().parents[2] / "docs"


def code_of(page: str, **known: Any) -> dict[str, Any]:
    """What the code of a page defines, one block after the other, among the names of the file that
    the page says it goes into.
    """
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)
    assert blocks
    names = dict(known)
    for block in blocks:
        exec(compile(block, page, "exec"), names)  # noqa: S102 (our own page)
    return names


def test_a_training_method_is_added_as_the_page_says(
    pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = code_of("add_a_training_method.md", **vars(projections), Method=Method)
    monkeypatch.setitem(methods.METHODS, "custom diffusion", page["METHOD"])  # its name is known
    config = TrainConfig(steps=3, batch_size=2, learning_rate=1e-2, resolution=RESOLUTION)
    concept = cat_concept()
    with borrowed_models(pipeline) as models:
        learnt = train(
            config, [concept], [random_bank(concept)], models.denoiser, models.text_encoder
        )
        layers = set(models.denoiser.projections)
    assert set(learnt.deltas) == {layer for layer in layers if layer.endswith("to_k")}
    assert all(delta.dense().norm() > 0 for delta in learnt.deltas.values())


@pytest.fixture
def add_concepts() -> Callable[..., Concept]:
    page = code_of("add_a_merge_method.md", **vars(merging), DenseDelta=DenseDelta)
    return page["add_concepts"]  # type: ignore[no-any-return]


def test_a_way_to_merge_is_added_as_the_page_says(add_concepts: Callable[..., Concept]) -> None:
    cat = random_concept()
    dog = random_concept("<new2>", "dog", seed=1)
    both = add_concepts([cat, dog], [1.0, -0.5])
    for layer in cat.layers:
        by_hand = cat.deltas[layer].dense().double() - 0.5 * dog.deltas[layer].dense().double()
        torch.testing.assert_close(both.deltas[layer].dense().double(), by_hand)
    assert [token.name for token in both.tokens] == ["<new1>", "<new2>"]
    turned = add_concepts([dog, cat], [-0.5, 1.0])
    assert all(
        torch.allclose(both.deltas[k].dense(), turned.deltas[k].dense()) for k in both.layers
    )
    with pytest.raises(TokenError):
        add_concepts([cat, cat], [1.0, 1.0])
    with pytest.raises(MergeError, match="1 strengths were given for 2 concepts"):
        add_concepts([cat, dog], [1.0])
