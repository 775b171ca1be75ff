"""Inputs that several nodes of a training share: one home for their bounds and words."""

from typing import get_args

from comfy_api.latest import io

from ..trainer.config import Fit, MethodName, TrainConfig
from ..trainer.methods import recipe

DEFAULTS = TrainConfig()


def resolution_input() -> io.Int.Input:
    return io.Int.Input(
        "resolution",
        default=DEFAULTS.resolution,
        min=64,
        max=2048,
        step=8,
        tooltip="512 for SD 1.x and 2.x base, 768 for SD 2.1 768, 1024 for SDXL.",
    )


def seed_input() -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=False)


def method_inputs(name: MethodName) -> list[io.Input]:
    """What a method has settings of its own for."""
    defaults = recipe(name)
    inputs = [
        io.Int.Input("steps", default=defaults.steps, min=1, max=100_000),
        io.Float.Input(
            "learning_rate",
            default=defaults.learning_rate,
            min=1e-7,
            max=0.1,
            step=1e-6,
            round=False,
        ),
    ]
    if name == "low-rank":
        inputs.append(io.Int.Input("rank", default=defaults.rank, min=1, max=320))
    return inputs


def view_inputs() -> list[io.Input]:
    """How views are made of pictures: the same for the training and for what shows them."""
    return [
        io.Boolean.Input(
            "augment",
            default=DEFAULTS.augment,
            advanced=True,
            tooltip="Random sizes with words that say so, as in the paper.",
        ),
        io.Boolean.Input(
            "flip",
            default=DEFAULTS.flip,
            advanced=True,
            tooltip="Mirror half of the pictures. Off for writing and faces.",
        ),
        io.Combo.Input(
            "fit",
            options=list(get_args(Fit)),
            default=DEFAULTS.fit,
            advanced=True,
            tooltip="Pictures that are not square: crop to the middle, or letterbox: all of them, "
            "between grey bars that do not count.",
        ),
    ]
