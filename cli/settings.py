"""Options for the settings of a training and of its job, made from their tables, as the inputs of
the Train node are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from ..concept.errors import ConfigError
from ..trainer.config import SETTINGS
from ..trainer.jobs.settings import JOB_SETTINGS, JobSettings
from ..trainer.settings import Group, Setting

OFFERED = [one for one in SETTINGS.values() if one.group]
OFFERED_OF_JOBS = list(JOB_SETTINGS.values())
TITLES: Mapping[Group, str] = {
    **dict.fromkeys(("method", "run"), "how it learns"),
    "views": "how it sees the pictures",
    **dict.fromkeys(("advanced", "added"), "what you rarely need"),
    "options": "what few trainings need",
}


def add_setting_options(parser: argparse.ArgumentParser) -> None:
    """An option for each; what is on is turned off by `--no-...`."""
    groups: dict[str, Any] = {}
    for one in OFFERED:
        title = TITLES[one.group or "run"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_option(groups[title], one)


def add_job_options(group: Any) -> None:
    """`group` is a parser or one of its groups."""
    for one in OFFERED_OF_JOBS:
        _add_option(group, one, "With --jobs. ")


def chosen_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Those of a training that were given on the command line, by name.

    Samples are drawn where something is said of them: without a page nobody looks at them.
    """
    chosen = _chosen(options, OFFERED)
    if "preview_prompts" not in chosen:
        chosen.setdefault("preview_every_steps", 0)
    return chosen


def job_settings(options: argparse.Namespace) -> JobSettings:
    """Raises ConfigError for one without a job."""
    chosen = _chosen(options, OFFERED_OF_JOBS)
    if chosen and not options.jobs:
        name = next(iter(chosen)).replace("_", "-")
        raise ConfigError(
            f"--{name} is a setting of a training that is a job. Give --jobs FOLDER, too."
        )
    return JobSettings(**chosen)


def _chosen(options: argparse.Namespace, offered: Iterable[Setting]) -> dict[str, Any]:
    chosen = {one.name: getattr(options, one.name) for one in offered}
    return {
        name: "\n".join(value) if isinstance(value, list) else value
        for name, value in chosen.items()
        if value is not None
    }


def _add_option(parser: Any, setting: Setting, condition: str = "") -> None:
    words = setting.name.replace("_", "-")
    text = setting.help.replace("%", "%%")
    for name in SETTINGS:
        if "_" in name:
            text = text.replace(name, f"--{name.replace('_', '-')}")
    if setting.kind is bool:
        switch = f"--no-{words}" if setting.default else f"--{words}"
        text = f"turns this off: {text}" if setting.default else text
        parser.add_argument(
            switch,
            dest=setting.name,
            action="store_const",
            const=not setting.default,
            help=text,
        )
        return
    if setting.kind is str and not setting.choices:
        prompts = "prompts" in words
        text += " Here: each in quotes." if prompts else ""
        metavar = "PROMPT" if prompts else "N"
        parser.add_argument(f"--{words}", nargs="+", metavar=metavar, help=text)
        return
    parser.add_argument(
        f"--{words}",
        type=setting.kind,
        choices=setting.choices or None,
        help=f"{condition}{text} Default: {_default(setting)}.",
    )


def _default(setting: Setting) -> str:
    if setting.name == "preview_every_steps":
        return f"none; {setting.default} with --preview-prompts"
    own = setting.group == "method" and not setting.method
    return "the method's own" if own else str(setting.default)
