"""Settings that nobody has chosen follow the model: its method, its resolution, enough steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..concept.concept import Concept
from ..concept.layers import Family
from .card import fit_card
from .config import MethodName, TrainConfig
from .methods import METHODS, recipe

AUTOMATIC = "automatic"
"""Instead of a method: the one that suits the model"""
FOLLOWS = 0
"""Instead of a resolution, or of steps: what suits the model, and the method"""
_DEFAULTS = TrainConfig()


def native_resolution(family: Family, velocity: bool) -> int:
    """The edge in pixels that checkpoints of a family were trained at. The two Stable Diffusions
    2.x differ in what they predict.
    """
    if family.name == "sd2" and velocity:
        return 768
    return 1024 if family.name == "sdxl" else _DEFAULTS.resolution


def follow_model(
    chosen: Mapping[str, Any],
    family: Family,
    velocity: bool,
    concepts: int,
    start: Concept | None = None,
    unet_bytes: int | None = None,
) -> tuple[TrainConfig, str]:
    """Settings in which nothing is left to be found out, and a sentence on what was found and why;
    empty where all of it was chosen.

    `start` is what the training goes on from, `concepts` how many are taught together, `unet_bytes`
    how large the UNet's weights are. Raises ConfigError for what a setting cannot be.
    """
    settings, found = dict(chosen), []
    why = f"the checkpoint is {family.title}"
    why += ", which predicts velocity" if family.name == "sd2" and velocity else ""
    if settings["method"] == AUTOMATIC:
        method = _method_of(start)
        found.append(f"method {method or _suiting(family)}")
        why += ", and the concept to extend was taught so" if method else ""
        settings["method"] = method or _suiting(family)
        settings = {"learning_rate": recipe(settings["method"]).learning_rate, **settings}
    if settings.get("resolution", FOLLOWS) == FOLLOWS:
        settings["resolution"] = native_resolution(family, velocity)
        found.append(f"resolution {settings['resolution']}")
    if settings.get("steps", FOLLOWS) == FOLLOWS:
        each = METHODS[settings["method"]].steps
        settings["steps"] = each * concepts
        found.append(f"{each * concepts} steps" + (f", {each} a concept" * (concepts > 1)))
    said = ", ".join(found)
    sentences = [f"{said[:1].upper()}{said[1:]}: {why}."] if found else []
    config = TrainConfig(**settings)
    if config.card_gb:
        free = chosen["method"] == AUTOMATIC and start is None
        config, for_card = fit_card(config, family, free, unet_bytes)
        sentences.append(for_card)
    return config, " ".join(sentences)


def _suiting(family: Family) -> MethodName:
    """SDXL's keys and values are 341 million numbers: to learn them whole, with their gradients and
    AdamW's state, takes more than 5 GB.
    """
    return "low-rank" if family.name == "sdxl" else _DEFAULTS.method


def _method_of(start: Concept | None) -> MethodName | None:
    """What it was taught by, where another training by that can go on from the file alone."""
    taught_by = start.provenance.get("method") if start else None
    known = (name for name, method in METHODS.items() if not method.whole_network)
    return next((name for name in known if name == taught_by), None)
