"""Regions in ComfyUI: each place of the picture reads its own prompt, with its own concept.

Beside the routing of the prompt for the whole picture (`routing.py`), hooks at the cross-attention
of the network mix in what regions say. They last as long as a sampling, like the router's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.conds
import torch
from torch import Tensor, nn

from ...composition.features import MarkedFeatures, marks_of, plain
from ...composition.regions import (
    Region,
    RegionalAttention,
    RegionError,
    RegionPrompts,
    said_in,
    shared,
)
from ...composition.routing import Route, Router
from ...concept.errors import IncompatibleModelError
from .routing import Routing, check_routes, marking_clip

REGIONS = "custom_diffusion_regions"
"""In a conditioning: the key of the node whose regions it has"""


def apply_regions(
    model: Any, clip: Any, prompt: str, regions: Sequence[Region]
) -> tuple[Any, Any, Any, tuple[str, ...]]:
    """A MODEL and CLIP that know the regions' concepts, the CONDITIONING of the whole picture, and
    what their user should know.
    """
    if any(_is_regional(wrappers) for wrappers in model.wrappers.values()):
        raise IncompatibleModelError(
            "This MODEL has regions already. Give all regions to one Apply Regions, and connect "
            "the MODEL that goes into it."
        )
    routes = [region.route for region in regions if region.route is not None]
    check_routes(model, clip, routes)
    routing = RegionalRouting(routes, shared([region.mask for region in regions]))
    knowing, remarks = marking_clip(clip, routing.concepts)
    keys = {id(route): key for key, route in routing.routes.items()}
    for region in regions:
        said = said_in(region, prompt, regions)
        features = knowing.encode_from_tokens(knowing.tokenize(said))
        routing.say(said, features, keys.get(id(region.route)))
    conditioning = knowing.encode_from_tokens_scheduled(knowing.tokenize(prompt))
    placed = [[features, {**options, REGIONS: routing.key}] for features, options in conditioning]
    return routing.on(model), knowing, placed, (*remarks, *routing.remarks())


def _is_regional(wrappers: Mapping[Any, Sequence[Any]]) -> bool:
    return any(
        isinstance(getattr(wrapper, "__self__", None), RegionalRouting)
        for listed in wrappers.values()
        for wrapper in listed
    )


@dataclass(frozen=True)
class _Said:
    """A region's prompt, encoded."""

    prompt: str
    features: MarkedFeatures | Tensor
    key: str | None
    """Of the route of its concept"""


class RegionalRouting(Routing):
    """The routes of one Apply Regions, and its regions."""

    def __init__(self, routes: Sequence[Route], shares: Tensor) -> None:
        super().__init__(routes)
        self._shares = shares
        self._flag = f"{self.key}_regions"
        self._said: list[_Said] = []
        self._numbers: Sequence[Tensor] = ()
        self._attentions: dict[Router, RegionalAttention] = {}

    def say(self, prompt: str, features: Tensor, key: str | None) -> None:
        """What the next region says, and the key of its route."""
        self._said.append(_Said(prompt, features, key))

    def remarks(self) -> Iterator[str]:
        """Regions whose prompts lack the words of their concepts."""
        for number, (said, own) in enumerate(zip(self._said, self.own_beside(), strict=True), 1):
            if said.key is not None and not any(rows.any() for rows in own):
                concept = self.routes[said.key].concept
                yield (
                    f"The prompt of region {number}, {said.prompt[:60]!r}, has no words of "
                    f"{concept.describe()}: the concept does nothing there."
                )

    def own_beside(self) -> Sequence[Sequence[Tensor]]:
        """In a region's prompt its own concept acts alone; one that was taught through every word
        acts at every word.
        """
        return [[self._own(said, key) for key in self.routes] for said in self._said]

    def _own(self, said: _Said, key: str) -> Tensor:
        features = plain(said.features)
        if key != said.key:
            return torch.zeros_like(features)
        if self.routes[key].concept.scope == "every word":
            return features
        return marks_of(said.features).get(key, torch.zeros_like(features))

    def numbered_beside(self, numbers: Sequence[Tensor]) -> None:
        self._numbers = numbers

    def sample(self, executor: Any, guider: Any, *args: Any, **kwargs: Any) -> Any:
        """As `Routing.sample`; raises where regions could not be seen."""
        conditions = [one for ones in guider.conds.values() for one in ones]
        placed = [one for one in conditions if one.get(REGIONS) == self.key]
        if not placed:
            raise IncompatibleModelError(
                "No prompt of this sampling has the regions of its MODEL. Connect the CONDITIONING "
                "that comes out of Apply Regions as the positive prompt."
            )
        if any("area" in one for one in placed):
            raise RegionError(
                "The prompt with regions is limited to an area of the picture. Regions count over "
                "all of it: take the area away, and give the region a box instead."
            )
        patches = guider.model_options.get("transformer_options", {}).get("patches_replace", {})
        if patches.get("attn2"):
            raise RegionError(
                "Another node replaces cross-attention (an IP-Adapter for one), and regions are "
                "drawn by cross-attention. Take that node away, or Apply Regions."
            )
        return super().sample(executor, guider, *args, **kwargs)

    def beside_numbers(self, condition: Mapping[str, Any]) -> Mapping[str, Any]:
        has = float(condition.get(REGIONS) == self.key)
        return {self._flag: comfy.conds.CONDRegular(torch.tensor([[has]]))}

    def hook(self, model: Any, router: Router, device: torch.device, dtype: torch.dtype) -> None:
        attention = RegionalAttention(router, _attend)
        contexts = [plain(said.features)[0] for said in self._said]
        said = RegionPrompts(contexts, self._shares, [one[0] for one in self._numbers])
        attention.sets = [said.to(device, dtype)]
        self._attentions[router] = attention
        self.hooks.callback(self._attentions.pop, router, None)
        for name, module in model.diffusion_model.named_modules():
            if name.endswith(".attn2"):
                handle = module.register_forward_hook(attention.hook, with_kwargs=True)
                self.hooks.callback(handle.remove)

    @contextmanager
    def looking(self, router: Router, x: Tensor, given: Mapping[str, Any]) -> Iterator[None]:
        attention = self._attentions[router]
        attention.size = (x.shape[-2], x.shape[-1])
        attention.chosen = [int(has) for has in given[self._flag].flatten().tolist()]
        try:
            yield
        finally:
            attention.chosen = ()


def _attend(module: nn.Module, x: Tensor, context: Tensor, named: Mapping[str, Any]) -> Tensor:
    # Past the hooks, which would look at regions again.
    options = {"transformer_options": named.get("transformer_options", {})}
    out: Tensor = module.forward(x, context=context, **options)
    return out
