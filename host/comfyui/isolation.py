"""A guider for which the subjects of regions are denoised apart, each with its own prompt and its
own concept, and the predictions of the clean picture are joined.
"""

from __future__ import annotations

from typing import Any

import comfy.samplers
from torch import Tensor

from ...composition.isolation import ISOLATED_FROM, joined
from ...composition.timing import SpanError
from ...concept.errors import IncompatibleModelError
from .regions import RegionalRouting, regional_routing

_CALCULATE = "sampler_calc_cond_batch_function"
"""In a model's options: what ComfyUI predicts a list of prompts with"""


def isolated_guider(
    model: Any, positive: Any, negative: Any, cfg: float, start: float = ISOLATED_FROM
) -> Any:
    """A GUIDER for a MODEL and its prompt from Apply Regions. Until `start`, a share of the
    sampling, it is ComfyUI's own.
    """
    routing = regional_routing(model)
    if routing is None:
        raise IncompatibleModelError(
            "This MODEL has no regions, so there are no subjects to keep apart. Connect the MODEL "
            "and the positive prompt of Apply Regions."
        )
    if not 0 <= start <= 1:
        raise SpanError(f"start_percent is {start:g}; it is a share of the sampling, 0 to 1.")
    guider = IsolatedGuider(model, routing, start)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


class IsolatedGuider(comfy.samplers.CFGGuider):  # type: ignore[misc]
    """Predicts N subjects and the whole picture at each step, and joins them."""

    def __init__(self, model: Any, routing: RegionalRouting, start: float) -> None:
        super().__init__(model)
        self._routing, self._start = routing, start
        self.subjects: list[str] = []

    def set_conds(self, positive: Any, negative: Any) -> None:
        apart = {f"subject_{n}": one for n, one in enumerate(self._routing.subjects(positive))}
        self.subjects = list(apart)
        self.inner_set_conds({"positive": positive, "negative": negative, **apart})

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None
    ) -> Any:
        options = dict(model_options or {})
        places = self._routing.places
        progress = self._routing.progress(timestep)
        places.settle(progress)
        if progress >= self._start and not places.seeks:
            calculate = options.get(_CALCULATE, _calculate)
            options[_CALCULATE] = lambda given: self._joined(calculate, given)
        return super().predict_noise(x, timestep, options, seed)

    def _joined(self, calculate: Any, given: Any) -> list[Any]:
        """Predictions of the clean picture: of the prompt with all subjects in it, and of the
        negative one.
        """
        apart = [self.conds[name] for name in self.subjects]
        positive, negative, *subjects = calculate({**given, "conds": [*given["conds"], *apart]})
        shares = self._routing.places.shares_at(*positive.shape[-2:])
        return [joined(positive, subjects, shares), negative]


def _calculate(given: Any) -> Any:
    """As ComfyUI does without such an option."""
    return comfy.samplers.calc_cond_batch(
        given["model"], given["conds"], given["input"], given["sigma"], given["model_options"]
    )
