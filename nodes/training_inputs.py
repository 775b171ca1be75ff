"""Inputs for the settings of a training, made from their one table in `trainer/config.py`."""

from typing import Any

from comfy_api.latest import io

from ..trainer.automatic import FOLLOWS
from ..trainer.config import SETTINGS, MethodName, TrainConfig
from ..trainer.jobs.settings import JOB_SETTINGS, JobSettings
from ..trainer.methods import recipe
from ..trainer.settings import Group, Setting

DEFAULTS = TrainConfig()
_ADVANCED = ("views", "advanced", "added", "job")
VIEW_SETTINGS = ("resolution", "seed", "augment", "flip", "fit")
_FOLLOWING = {
    "resolution": "0 follows the model.",
    "steps": "Method automatic: 0 trains as long as the method needs, for each concept.",
}
"""What else a node says of a setting that it can leave open"""


def view_inputs() -> list[io.Input]:
    """Those that views depend on, for a node that takes them from a training where there is one."""
    inputs = [_input(SETTINGS[name], DEFAULTS) for name in VIEW_SETTINGS]
    for one in inputs:
        one.advanced = True
        one.tooltip = f"Used only where no Custom Diffusion Train has the concept. {one.tooltip}"
    return inputs


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


def automatic_inputs() -> list[io.Input]:
    """What can be chosen where the method is not."""
    return [_input(SETTINGS["steps"], DEFAULTS, follows=True)]


def _input(
    setting: Setting, defaults: TrainConfig | JobSettings, follows: bool = False
) -> io.Input:
    """Of a setting that `follows` the model if nobody chooses."""
    words = " ".join(filter(None, (setting.help, _FOLLOWING.get(setting.name))))
    options: dict[str, Any] = {"default": getattr(defaults, setting.name), "tooltip": words}
    if setting.group in _ADVANCED:
        options["advanced"] = True
    if setting.group in ("added", "options"):  # graphs from before there was a choice still run
        options["optional"] = True
    if setting.choices:
        return io.Combo.Input(setting.name, options=list(setting.choices), **options)
    if setting.kind is str:
        return io.String.Input(setting.name, multiline=True, **options)
    if setting.kind is bool:
        return io.Boolean.Input(setting.name, **options)
    options |= {"min": setting.least, "max": setting.most, "step": setting.step}
    if follows or setting.name == "resolution":
        options |= {"default": FOLLOWS, "min": FOLLOWS}
    if setting.kind is int:
        # A widget called seed would otherwise draw another one after every run.
        drawn = False if setting.name == "seed" else None
        return io.Int.Input(setting.name, control_after_generate=drawn, **options)
    # The page rounds to whole steps, and small values would become 0.
    rounds = False if 0 < (setting.least or 0) < (setting.step or 0) else None
    return io.Float.Input(setting.name, round=rounds, **options)
