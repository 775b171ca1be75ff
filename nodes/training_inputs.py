"""Inputs for the settings of a training, made from their one table in `trainer/config.py`."""

from typing import Any

from comfy_api.latest import io

from ..trainer.config import SETTINGS, MethodName, TrainConfig
from ..trainer.jobs.settings import JOB_SETTINGS, JobSettings
from ..trainer.methods import recipe
from ..trainer.settings import Group, Setting

DEFAULTS = TrainConfig()
_ADVANCED = ("views", "advanced", "added", "job")


def setting_input(name: str) -> io.Input:
    """The input of one setting."""
    return _input(SETTINGS[name], DEFAULTS)


def setting_inputs(group: Group) -> list[io.Input]:
    """Those of a group, in the order of the table."""
    return [_input(one, DEFAULTS) for one in SETTINGS.values() if one.group == group]


def method_inputs(name: MethodName) -> list[io.Input]:
    """What a method has settings of its own for."""
    own = [one for one in SETTINGS.values() if one.group == "method" and one.method in ("", name)]
    return [_input(one, recipe(name)) for one in own]


def job_input(name: str) -> io.Input:
    """The input of a setting of the job."""
    return _input(JOB_SETTINGS[name], JobSettings())


def _input(setting: Setting, defaults: TrainConfig | JobSettings) -> io.Input:
    options: dict[str, Any] = {"default": getattr(defaults, setting.name), "tooltip": setting.help}
    if setting.group in _ADVANCED:
        options["advanced"] = True
    if setting.group == "added":  # graphs that were saved before there was a choice still run
        options["optional"] = True
    if setting.choices:
        return io.Combo.Input(setting.name, options=list(setting.choices), **options)
    if setting.kind is str:
        return io.String.Input(setting.name, multiline=True, **options)
    if setting.kind is bool:
        return io.Boolean.Input(setting.name, **options)
    options |= {"min": setting.least, "max": setting.most, "step": setting.step}
    if setting.kind is int:
        # A widget called seed would otherwise draw another one after every run.
        drawn = False if setting.name == "seed" else None
        return io.Int.Input(setting.name, control_after_generate=drawn, **options)
    # The page rounds to whole steps, and small values would become 0.
    rounds = False if 0 < (setting.least or 0) < (setting.step or 0) else None
    return io.Float.Input(setting.name, round=rounds, **options)
