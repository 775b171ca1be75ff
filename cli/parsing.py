"""Reading a command line so that a slip of the finger is named, with what was probably meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn


class _Help(argparse.RawDescriptionHelpFormatter):
    """Says defaults that are worth saying, and leaves examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        shown = isinstance(action.default, (str, int, float, Path)) and action.default not in (
            "",
            False,
        )
        if action.default is argparse.SUPPRESS or not shown or "default" in (text or "").lower():
            return text
        return f"{text} (default: %(default)s)" if text else "default: %(default)s"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        """Short ones: N for whole numbers, X for others, FILE for paths."""
        kinds: dict[Any, str] = {int: "N", positive: "N", float: "X", Path: "FILE"}
        return kinds.get(action.type) or super()._get_default_metavar_for_optional(action)


class CommandParser(argparse.ArgumentParser):
    """As argparse's, but what it does not know is compared with what it does."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        """`example` is a command line without the program's name."""
        if example:
            kwargs["epilog"] = f"example:\n  custom-diffusion {example}"
        kwargs["formatter_class"] = _Help
        super().__init__(*args, **kwargs)
        self.example = example
        self._given: list[str] = []

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        # Also where a command's own parser is asked by that of all commands, which would name what
        # is left and could not say what the command knows.
        self._given = list(args or ())
        options, left = super().parse_known_args(args, namespace)
        if unknown := next(filter(None, left), None):
            self.error(f"{unknown} is unknown here{self._meant(unknown)}")
        return options, left

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if wrong and (near := nearest(wrong[1], re.findall(r"[\w-]+", wrong[2]))):
            message += f". Did you mean {near}?"
        # What is missing may be there, with a slip: argparse looks for what is missing first.
        elif "required" in message and (slip := self._slip()):
            message = f"{slip} is unknown here{self._meant(slip)}"
        super().error(message)

    def _slip(self) -> str:
        """The first option given that none begins with; empty where there is none."""
        names = (word.partition("=")[0] for word in self._given if word.startswith("--"))
        known = self._option_string_actions
        return next((n for n in names if not any(k.startswith(n) for k in known)), "")

    def _meant(self, unknown: str) -> str:
        near = nearest(unknown.partition("=")[0], self._option_string_actions)
        if near:
            return f". Did you mean {near}?"
        return ". --help names everything that is known."


def nearest(word: str, known: Iterable[str]) -> str:
    """What was probably meant; empty where nothing is near."""
    return next(iter(difflib.get_close_matches(word, list(known), 1)), "")


def named(known: Iterable[str]) -> Any:
    """A type for names that may be written with hyphens for blanks: `fine-tune-all`."""
    by_letters = {re.sub(r"[\W_]+", "", name).lower(): name for name in known}

    def name(word: str) -> str:
        return by_letters.get(re.sub(r"[\W_]+", "", word).lower(), word)

    return name


def positive(text: str) -> int:
    """A type for counts of 1 and more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is given; 1 is the least")
    return number


def package_version() -> str:
    try:
        return version("custom-diffusion")
    except PackageNotFoundError:  # the folder alone, as in ComfyUI
        return "of a folder that is not installed"
