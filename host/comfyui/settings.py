"""Settings that a node takes from elsewhere: from the MODEL that is connected, or from the Train
node that it belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...concept.concept import Concept
from ...concept.layers import FAMILIES
from ...trainer.automatic import FOLLOWS, follow_model
from ...trainer.config import TrainConfig
from ...trainer.data.training_concept import TrainingConcept
from ...trainer.methods import gradient_cut
from .models.parts import noise_of
from .models.weights import cross_attention_unet, unet_family

TRAIN = "CustomDiffusionTrain"
OPTIONS = "CustomDiffusionOptions"
_LOOKED_AT = (
    *("method", "resolution", "more_resolutions", "seed", "augment", "flip", "fit"),
    *("gradient_cut", "seg_mix", "seg_mix_smallest", "seg_mix_largest"),
)
"""What the views of a training depend on"""


def follow_comfy_model(
    model: Any, chosen: Mapping[str, Any], concepts: int = 1, start: Concept | None = None
) -> tuple[TrainConfig, str]:
    """`follow_model` for a MODEL. Raises IncompatibleModelError where it cannot be trained."""
    unet = cross_attention_unet(model)
    velocity = noise_of(model).prediction == "v_prediction"
    size = sum(weight.nbytes for weight in unet.parameters())
    return follow_model(chosen, unet_family(unet), velocity, concepts, start, size)


@dataclass(frozen=True)
class Training:
    """What a prompt's graph says of the training that a node's concept goes into."""

    node_id: str
    settings: Mapping[str, Any]
    """Those that its views depend on, by name, without those that another node computes"""


def training_of(graph: Mapping[str, Any], node_id: str) -> Training | None:
    """The first Train node that has the same concept as the input `concept` of this one."""
    link = graph.get(node_id, {}).get("inputs", {}).get("concept")
    for key, node in graph.items():
        inputs = node["inputs"]
        slots = [value for name, value in inputs.items() if name.startswith("concepts.")]
        if link is not None and node["class_type"] == TRAIN and link in slots:
            inputs = {**inputs, **_options_of(graph, inputs)}
            names = [name for name in _LOOKED_AT if not isinstance(inputs.get(name, []), list)]
            return Training(key, {name: inputs[name] for name in names})
    return None


def _options_of(graph: Mapping[str, Any], inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Inputs of the options node that a Train node is connected to, where there is one."""
    link = inputs.get("options")
    node = graph.get(link[0], {}) if isinstance(link, list) and link else {}
    return node.get("inputs", {}) if node.get("class_type") == OPTIONS else {}


def as_trained(
    concept: TrainingConcept, own: Mapping[str, Any], training: Training | None, model: Any = None
) -> tuple[TrainingConcept, TrainConfig, list[str]]:
    """What a run draws its views from, its settings, and where they come from: a sentence each.

    They are those of the Train node, else `own`. Without a `model` a resolution that follows it is
    that of Stable Diffusion 1.x.
    """
    settings = training.settings if training else {}
    chosen = {"method": TrainConfig.method, **own, **settings}
    lines = [f"As set on Custom Diffusion Train ({training.node_id})."] if training else []
    if model is not None:
        config, _ = follow_comfy_model(model, chosen)
    else:
        config, _ = follow_model(chosen, FAMILIES["sd15"], velocity=False, concepts=1)
    if chosen["resolution"] == FOLLOWS:
        hint = "" if model is not None else ": connect the model to see the one that follows it"
        lines.append(f"Resolution {config.resolution}{hint}.")
    if training and concept.token and gradient_cut(config, None) == "own words":
        concept = replace(concept, regularization=())  # as `prepare` leaves them out
    return concept, config, lines
