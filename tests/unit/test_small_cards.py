"""What a training chooses for a graphics card, beside what the benchmark has counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.trainer import card
from custom_diffusion.trainer.automatic import follow_model
from custom_diffusion.trainer.card import counted_gib, fit_card
from custom_diffusion.trainer.config import TrainConfig

ON_CPU = {"text_encoder_on_cpu": True}
LOW_RANK = {"method": "low-rank", "rank": 16}
CHECKPOINTED = {"gradient_checkpointing": True}


@pytest.fixture(autouse=True)
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("family", "edge", "settings", "fits"),
    [
        ("sd15", 512, {}, {6: 6, 8: 10, 12: 18, 24: 44}),
        ("sd15", 512, CHECKPOINTED, {6: 20, 8: 35, 12: 64}),
        ("sd2", 768, {}, {6: 2, 8: 4, 12: 7, 24: 19}),
        ("sd2", 768, {**ON_CPU, **CHECKPOINTED}, {6: 9, 8: 16, 12: 29}),
        ("sdxl", 1024, {}, {12: 0, 24: 3}),
        ("sdxl", 1024, CHECKPOINTED, {12: 0, 24: 18}),
        ("sdxl", 1024, {**LOW_RANK, **CHECKPOINTED}, {8: 0, 12: 5, 24: 24}),
        ("sdxl", 1024, {**LOW_RANK, **ON_CPU, **CHECKPOINTED}, {6: 0, 8: 2, 12: 8, 24: 27}),
        ("sdxl", 1024, {**LOW_RANK, **ON_CPU}, {8: 0, 12: 1, 24: 4}),
    ],
)
def test_as_many_pictures_fit_as_were_counted_on_the_models_themselves(
    family: str, edge: int, settings: dict[str, Any], fits: dict[int, int]
) -> None:
    """The table of docs/performance.md, made by `benchmarks/training_memory.py`, which runs a step
    on the meta device: give or take what the first picture holds more than another.
    """
    config = TrainConfig(resolution=edge, batch_size=256, **settings)
    # The benchmark's step has four captions with the word.
    captions = 252 * card._HELD[family].caption * (not config.text_encoder_on_cpu)
    for gib, count in fits.items():
        own = max(
            (n for n in range(256) if counted_gib(config, FAMILIES[family], n) - captions <= gib),
            default=0,
        )
        assert abs(own - count) <= max(1, 0.06 * count), (gib, own)


def chosen(family: str, card_gb: int, **more: Any) -> tuple[TrainConfig, str]:
    settings = {"method": "automatic", "steps": 0, "resolution": 0, "card_gb": card_gb}
    return follow_model({**settings, **more}, FAMILIES[family], velocity=False, concepts=1)


def test_where_all_of_it_fits_nothing_changes() -> None:
    plain, _ = follow_model({"method": "automatic"}, FAMILIES["sd15"], velocity=False, concepts=1)
    config, said = chosen("sd15", 24)
    assert replace(config, card_gb=0) == plain
    assert said.endswith("For a card of 24 GB: all as it is set; 6.9 GB are counted.")


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
@pytest.mark.parametrize("card_gb", [6, 8, 12, 16, 24])
def test_what_is_said_to_fit_is_no_more_than_the_card_has(family: str, card_gb: int) -> None:
    config, said = chosen(family, card_gb)
    at_once = config.micro_batch_size or config.batch_size
    held = counted_gib(config, FAMILIES[family], at_once)
    assert f"{held:.1f} GB" in said
    too_small = "is too small" in said
    assert too_small == (held > card_gb) == ((family, card_gb) == ("sdxl", 6))
    assert at_once <= config.batch_size == 8


def test_it_takes_no_more_than_it_needs() -> None:
    steps = [chosen("sdxl", gib)[0] for gib in (24, 16, 12, 8)]
    assert [config.gradient_checkpointing for config in steps] == [False, False, True, True]
    assert [config.text_encoder_on_cpu for config in steps] == [False, False, False, True]
    assert [config.method for config in steps] == ["low-rank"] * 4


def test_a_method_that_was_chosen_stays_and_another_is_found_where_none_was() -> None:
    dense, said = chosen("sdxl", 8, method="custom diffusion")
    assert dense.method == "custom diffusion" and "too small" in said
    start = replace(TrainConfig(), resolution=1024, card_gb=8)
    free, said = fit_card(start, FAMILIES["sdxl"], free=True)
    assert free.method == "low-rank" and "method low-rank" in said and "too small" not in said


def test_the_models_own_weights_count() -> None:
    """Loaded in 8 bits, half as much."""
    low, said = chosen("sdxl", 6)
    assert "too small" in said and "8-bit weights" in said
    settings = {"method": "automatic", "steps": 0, "resolution": 0, "card_gb": 6}
    small = FAMILIES["sdxl"], False, 1, None, int(2.39 * 2**30)
    config, said = follow_model(settings, *small)
    assert "too small" not in said and config.text_encoder_on_cpu
    assert low.micro_batch_size == 1


def test_the_optimizer_is_offered_where_its_package_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "find_spec", lambda name: name == "bitsandbytes")
    config, said = chosen("sdxl", 16, method="custom diffusion")
    assert config.optimizer == "adamw" and "too small" not in said
    config, said = chosen("sdxl", 10, method="custom diffusion")
    assert config.optimizer == "adamw 8-bit" and "optimizer adamw 8-bit" in said


@pytest.mark.parametrize("method", ["dreambooth", "fine-tune all", "cross-attention"])
def test_methods_that_are_not_counted_are_left_alone(method: str) -> None:
    config, said = chosen("sd15", 8, method=method)
    assert "is not counted, so nothing was chosen" in said
    assert not config.gradient_checkpointing and not config.micro_batch_size
