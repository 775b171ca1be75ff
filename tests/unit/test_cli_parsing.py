"""Command lines with slips: what was probably meant is named."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from custom_diffusion.cli import main, parser
from custom_diffusion.cli.parsing import CommandParser
from custom_diffusion.trainer.methods import METHODS

TRAIN = "train --model m --images f --class-noun cat"


def commands(of: argparse.ArgumentParser) -> Iterator[CommandParser]:
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{TRAIN} --stpes 5", "--stpes is unknown here. Did you mean --steps?"),
        ("sample --modle sd15 --prompt cat", "--modle is unknown here. Did you mean --model?"),
        ("sample --model sd15", "are required: --prompt"),
        (f"{TRAIN} --learning_rate=1e-4", "Did you mean --learning-rate?"),
        (f"{TRAIN} --quux 5", "--quux is unknown here. --help names everything that is known."),
        (f"{TRAIN} --method dream-both", "Did you mean dreambooth?"),
        ("tran --model m", "Did you mean train?"),
        ("sample --model m --prompt p --count 0", "0 is given; 1 is the least"),
        ("sample --model m --prompt p --routes a", "--route"),
    ],
)
def test_a_slip_is_named(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(line))
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_methods_need_no_blanks(method: str) -> None:
    for written in (method, method.replace(" ", "-"), method.replace(" ", "_").upper()):
        assert parser().parse_args([*TRAIN.split(), "--method", written]).method == method


def test_every_command_has_an_example_that_is_right() -> None:
    for command in commands(parser()):
        assert command.example, command.prog
        read = parser().parse_args(shlex.split(command.example))
        assert callable(read.command)
        assert command.example in command.format_help()


def test_help_says_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "pictures, side by side (default: 1)" in told and "default: sample.png" in told


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"custom-diffusion {version('custom-diffusion')}\n"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sample.safetensors", "with which no picture can be saved. Take .png"),
        ("sample.psd", "with which no picture can be saved"),  # it can only be opened
        ("sample.xbm", "with which no picture can be saved"),  # it has no colours
        ("sample", "'of nothing'"),
        ("there.png", "exists already"),
    ],
)
def test_where_a_picture_cannot_go_is_told_before_a_model_is_read(
    name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.png").touch()
    line = ["sample", "--model", "nowhere", "--prompt", "p", "--output", str(tmp_path / name)]
    assert main(line) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--concept", "--route"])
def test_a_concept_that_is_not_there_is_told_before_a_model_is_read(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["sample", "--model", "nowhere", "--prompt", "p", option, str(tmp_path / "none")]
    assert main([*line, "--output", str(tmp_path / "a.png")]) == 1
    assert "There is no concept file" in capsys.readouterr().err


def test_a_folder_for_a_picture_is_made_or_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    line = ["sample", "--model", "nowhere", "--prompt", "p", "--output"]
    assert main([*line, str(tmp_path / "file" / "a.png")]) == 1
    assert "is no folder: move it away" in capsys.readouterr().err
    assert main([*line, str(tmp_path / "new" / "a.png")]) == 1
    assert "There is no model nowhere" in capsys.readouterr().err
    assert not list((tmp_path / "new").iterdir())


def test_every_option_says_what_it_is_for() -> None:
    silent = [
        (command.prog, option)
        for command in commands(parser())
        for action in command._actions
        for option in action.option_strings
        if not action.help
    ]
    assert silent == []
