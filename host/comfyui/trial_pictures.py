"""Pictures of an evaluation by ComfyUI's samplers, and where their subjects are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import comfy.sample
import torch

from ...attention.boxes import boxes_of
from ...composition.routing import Route
from ...concept.concept import Concept
from ...evaluation.trials import BASE, Drawn, Trial
from .apply import apply_concept
from .attention import watch_attention
from .drawing import Sampling, conditioning
from .routing import route_concepts


def drawing_of(
    model: Any,
    clip: Any,
    vae: Any,
    concepts: Sequence[Concept],
    routed: bool,
    sampling: Sampling,
) -> Callable[[Sequence[Trial]], Drawn]:
    """Draws with a concept as Apply Concept applies it, or with several as Route Concepts does."""

    @cache
    def applied(strength: float) -> tuple[Any, Any]:
        if routed and strength == BASE:
            return model, clip
        if routed:
            routes = [Route(concept, strength) for concept in concepts]
            return route_concepts(model, clip, routes)[:2]
        return apply_concept(model, clip, concepts[0], strength)

    def draw(trials: Sequence[Trial]) -> Drawn:
        first = trials[0]
        drawing, reading = applied(first.strength)
        if first.subjects:
            words = "\n".join(written for _, written in first.subjects)
            drawing, positive, recorder = watch_attention(drawing, reading, first.prompt, words)
        else:
            positive = conditioning(reading, first.prompt)
        noise = torch.cat(
            [comfy.sample.prepare_noise(sampling.empty(1), trial.seed) for trial in trials]
        )
        negative = conditioning(reading, "")
        images = sampling.draw(drawing, vae, positive, negative, noise, first.seed)
        if not first.subjects:
            return Drawn(images)
        names = [name for name, _ in first.subjects]
        return Drawn(images, boxes_of(recorder.maps().between(), names))

    return draw
