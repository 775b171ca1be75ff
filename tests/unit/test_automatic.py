"""Settings that nobody has chosen follow the model, and what was chosen stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.trainer.automatic import follow_model
from custom_diffusion.trainer.methods import METHODS, recipe
from support.made_concepts import made_concept

OPEN = {"method": "automatic", "steps": 0, "resolution": 0}


def followed(family: str, velocity: bool = False, concepts: int = 1, **chosen: Any) -> Any:
    start = chosen.pop("start", None)
    return follow_model({**OPEN, **chosen}, FAMILIES[family], velocity, concepts, start)


@pytest.mark.parametrize(
    ("family", "velocity", "method", "resolution", "why"),
    [
        ("sd15", False, "custom diffusion", 512, "the checkpoint is Stable Diffusion 1.x"),
        ("sd15", True, "custom diffusion", 512, "the checkpoint is Stable Diffusion 1.x"),
        ("sd2", False, "custom diffusion", 512, "the checkpoint is Stable Diffusion 2.x"),
        (
            *("sd2", True, "custom diffusion", 768),
            "the checkpoint is Stable Diffusion 2.x, which predicts velocity",
        ),
        ("sdxl", False, "low-rank", 1024, "the checkpoint is Stable Diffusion XL"),
        ("sdxl", True, "low-rank", 1024, "the checkpoint is Stable Diffusion XL"),
    ],
)
def test_method_and_resolution_follow_the_model(
    family: str, velocity: bool, method: Any, resolution: int, why: str
) -> None:
    config, said = followed(family, velocity)
    assert config == replace(recipe(method), resolution=resolution)
    assert said == f"Method {method}, resolution {resolution}, 250 steps: {why}."


def test_concepts_that_are_taught_together_get_steps_each() -> None:
    config, said = followed("sd15", concepts=3)
    assert config.steps == 750
    assert "750 steps, 250 a concept:" in said


def test_what_was_chosen_stays() -> None:
    config, said = followed("sdxl", method="custom diffusion", steps=40, resolution=640)
    assert (config.method, config.steps, config.resolution) == ("custom diffusion", 40, 640)
    assert said == ""
    config, said = followed("sdxl", steps=40, resolution=640)
    assert (config.method, config.steps, config.resolution) == ("low-rank", 40, 640)
    assert said == "Method low-rank: the checkpoint is Stable Diffusion XL."


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_trained_as_it_was_published(method: Any) -> None:
    """A method with a learning rate of its own comes with it, as the node's option has it."""
    rate = recipe(method).learning_rate
    config, _ = followed("sd15", method=method, learning_rate=rate)
    assert config == recipe(method)


@pytest.mark.parametrize(
    ("taught_by", "method"),
    [
        ("cross-attention", "cross-attention"),
        ("textual inversion", "textual inversion"),
        ("low-rank", "low-rank"),
        ("dreambooth", "custom diffusion"),  # its UNet is not in the file
        ("something newer", "custom diffusion"),
        (7, "custom diffusion"),
    ],
)
def test_what_is_extended_is_taught_on_as_it_was(taught_by: Any, method: Any) -> None:
    layer = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    concept = made_concept({layer: (320, 768)}, "<new1>", "cat")
    concept.provenance["method"] = taught_by
    config, said = followed("sd15", start=concept)
    assert config == recipe(method)
    assert ("the concept to extend was taught so" in said) == (taught_by == method)
