"""Options for the settings of a training, made from their one table in `trainer/config.py`."""

from __future__ import annotations

import argparse
from typing import Any

from ..trainer.config import SETTINGS
from ..trainer.settings import Setting

OFFERED = [one for one in SETTINGS.values() if one.group and one.on_command]


def add_setting_options(parser: argparse.ArgumentParser) -> None:
    """An option for each; what is on is turned off by `--no-...`."""
    for one in OFFERED:
        _add_option(parser, one)


def chosen_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Those that were given on the command line, by name."""
    chosen = {one.name: getattr(options, one.name) for one in OFFERED}
    return {name: value for name, value in chosen.items() if value is not None}


def _add_option(parser: argparse.ArgumentParser, setting: Setting) -> None:
    words = setting.name.replace("_", "-")
    text = setting.help.replace("%", "%%")
    if setting.kind is bool:
        switch = f"--no-{words}" if setting.default else f"--{words}"
        text = f"off: {text}" if setting.default else text
        parser.add_argument(
            switch,
            dest=setting.name,
            action="store_const",
            const=not setting.default,
            help=text,
        )
        return
    default = "the method's own" if setting.group == "method" else setting.default
    default = setting.default if setting.method else default
    parser.add_argument(
        f"--{words}",
        type=setting.kind,
        choices=setting.choices or None,
        help=f"{text} Default: {default}.",
    )
