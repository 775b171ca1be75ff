"""The one table of settings: its bounds are enforced, and the command's options come from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import pytest
from custom_diffusion.cli import parser
from custom_diffusion.cli.settings import OFFERED
from custom_diffusion.cli.training import training_config
from custom_diffusion.concept.errors import ConfigError
from custom_diffusion.trainer.config import SETTINGS, TrainConfig
from custom_diffusion.trainer.settings import Setting, setting, settings_of

NUMBERS = [one for one in SETTINGS.values() if one.kind in (int, float)]
BASIC = ["train", "--model", "sd15", "--images", "cat", "--class-noun", "cat"]
FIRST_OPTIONS = {
    *("--rank 3", "--steps 3", "--batch-size 3", "--micro-batch-size 3", "--learning-rate 0.003"),
    *("--gradient-checkpointing", "--optimizer=adamw 8-bit", "--text-encoder-on-cpu", "--seed 3"),
    *("--resolution 640", "--gradient-cut start", "--no-augment", "--no-flip", "--fit letterbox"),
}
"""Of version 0.1.0"""
LATER_OPTIONS = {
    *("--prior-weight 0.5", "--weight-decay 0.1", "--preview-every-steps 10"),
    *("--validation-pictures 2", "--validation-every-steps 10", "--patience-steps 20"),
    "--early-stopping on",
    *("--seg-mix 0.3", "--seg-mix-smallest 0.5", "--seg-mix-largest 0.8"),
    "--card-gb 8",
    *("--more-resolutions 384,640", "--preview-seeds 1,2", "--preview-resolution 128"),
    *("--basis 2", "--word-steps 1"),
    "--attention-weight 0.01",
    *("--word-learning-rate 0.001", "--schedule cosine", "--warmup-steps 10"),
    "--max-gradient-norm 0.5",
    *("--loss-weighting min-snr", "--min-snr-gamma 3", "--noise-offset 0.05"),
    *("--min-timestep 10", "--max-timestep 900"),
    *("--caption-lines any", "--shuffle-captions", "--keep-parts 2", "--caption-dropout 0.1"),
    *("--plain-captions 0.2", "--class-prior 0.5"),
}


def configured(**settings: Any) -> TrainConfig:
    return TrainConfig(**settings)


@dataclass(frozen=True)
class Invented:
    """Settings that no training has."""

    count: int = setting(4, "So many.", "added", least=2, most=8, step=2)
    share: float | None = setting(0.5, "So much.", "added", least=0)
    side: Literal["left", "right"] = setting("left", "Where.", "added")
    words: str = setting("none", "What.", "added")


def test_a_table_is_read_from_the_fields() -> None:
    count, share, side, words = settings_of(Invented).values()
    assert (words.kind, words.choices, words.default) == (str, (), "none")
    assert (count.kind, count.default, count.may_be_none) == (int, 4, False)
    assert (share.kind, share.most, share.may_be_none) == (float, None, True)
    assert (side.kind, side.choices, side.help) == (str, ("left", "right"), "Where.")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 1, "count=1 is outside 2 to 8.*So many"),
        ("count", 10, "count=10 is outside 2 to 8"),
        ("count", 5, "count=5 is no multiple of 2. Use 4"),
        ("share", -0.1, "share=-0.1 is outside 0 to inf"),
        ("share", math.inf, "share=inf is outside"),
        ("share", math.nan, "share=nan is outside"),
        ("count", None, "count=None is no number"),
        ("side", "up", "side='up' is unknown; choose one of 'left', 'right'"),
        ("words", 3, "words=3 is no text.*What"),
    ],
)
def test_what_a_setting_cannot_be_is_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_of(Invented)[name].check(value)


def test_what_a_setting_can_be_is_accepted() -> None:
    count, share, side, words = settings_of(Invented).values()
    chosen = (side, ("left", "right")), (words, ("", "anything"))
    for one, values in ((count, (2, 4, 8)), (share, (None, 0, 1e9)), *chosen):
        for value in values:
            one.check(value)


@pytest.mark.parametrize("one", NUMBERS, ids=lambda one: one.name)
def test_the_bounds_of_the_table_are_those_of_the_configuration(one: Setting) -> None:
    step = one.step or 1 if one.kind is int else 1e-3
    for bound, beyond in ((one.least, -step), (one.most, step)):
        if bound is not None:
            assert getattr(configured(**{one.name: bound}), one.name) == bound
            with pytest.raises(ConfigError, match=f"{one.name}=.* is outside"):
                configured(**{one.name: bound + beyond})


def test_every_setting_says_what_it_means() -> None:
    assert list(SETTINGS) == [field.name for field in fields(TrainConfig)]
    assert all(one.help.endswith(".") for one in SETTINGS.values())


def test_every_option_changes_its_setting_and_no_other() -> None:
    plain = training_config(parser().parse_args(BASIC))
    changed = set()
    for option in FIRST_OPTIONS | LATER_OPTIONS:
        words = option.split(" ", 1) if "=" not in option else [option]
        config = training_config(parser().parse_args([*BASIC, *words]))
        (name,) = (
            name for name, value in config.as_json().items() if value != plain.as_json()[name]
        )
        assert name.replace("_", "-") == words[0].split("=")[0].removeprefix("--").removeprefix(
            "no-"
        )
        changed.add(name)
    assert len(changed) == len(FIRST_OPTIONS | LATER_OPTIONS)
    assert {one.name for one in OFFERED} - changed == {"preview_prompts"}  # two settings


def test_the_command_gives_the_methods_recipe_where_nothing_is_said() -> None:
    options = parser().parse_args([*BASIC, "--method", "dreambooth"])
    expected = TrainConfig(
        method="dreambooth", steps=800, learning_rate=5e-6, preview_every_steps=0
    )
    assert training_config(options) == expected
    options = parser().parse_args([*BASIC, "--method", "dreambooth", "--steps", "7"])
    assert training_config(options) == replace(expected, steps=7)


def test_help_of_the_command_is_that_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["train", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    options = {one.name: f"--{one.name.replace('_', '-')}" for one in OFFERED if "_" in one.name}
    for one in OFFERED:
        said = one.help.split(".")[0]
        for name, option in options.items():
            said = said.replace(name, option)
        assert said in words.replace("- ", "-"), one.name
