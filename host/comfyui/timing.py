"""A concept on a MODEL for a part of the sampling.

Hooks at the layers that it changes last as long as a sampling; before each prediction it is known
whether its time is there. So neither weights nor their place in memory change while it runs.
"""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from typing import Any

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...composition.timing import Span, TimedChanges
from ...concept.concept import Concept
from ...concept.fit import check_weight_patches


def timed_concept(model: Any, concept: Concept, strength: float, span: Span) -> Any:
    """A clone of a MODEL on which the concept counts for a part of the sampling."""
    check_weight_patches(concept)
    return _Timing(concept, strength, span).on(model)


class _Timing:
    """One node's part in sampling."""

    def __init__(self, concept: Concept, strength: float, span: Span) -> None:
        self._concept, self._strength, self._span = concept, strength, span
        self._key = f"custom_diffusion_timed_{uuid.uuid4().hex}"
        self._changes: dict[int, TimedChanges] = {}
        self._hooks = ExitStack()

    def on(self, model: Any) -> Any:
        timed = model.clone()
        timed.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, self._key, self.sample)
        timed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, self._key, self.predict)
        return timed

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a sampler: hooks last as long as it."""
        with ExitStack() as self._hooks:
            self._hooks.callback(self._changes.clear)
            return executor(*args, **kwargs)

    def predict(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Around a prediction of the network: whether the concept's time is there."""
        model = executor.class_obj
        changes = self._of(model, x.device)
        sampling = model.model_sampling
        first, last = (sampling.percent_to_sigma(p) for p in (self._span.start, self._span.end))
        changes.active = last <= float(t.flatten()[0]) <= first  # sigmas fall
        try:
            return executor(x, t, *args, **kwargs)
        finally:
            changes.active = False

    def _of(self, model: Any, device: Any) -> TimedChanges:
        if id(model) not in self._changes:
            changes = TimedChanges(self._concept, self._strength)
            dtype = model.manual_cast_dtype or model.get_dtype()
            for layer in self._concept.layers:
                module = model.diffusion_model.get_submodule(layer)
                handle = module.register_forward_hook(changes.hook(layer, device, dtype))
                self._hooks.callback(handle.remove)
            self._changes[id(model)] = changes
        return self._changes[id(model)]
