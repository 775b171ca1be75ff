"""Regions in ComfyUI: each place of the picture reads its own prompt, with its own concept.

Beside the routing of the prompt for the whole picture (`routing.py`), hooks at the cross-attention
of the network mix in what regions say. They last as long as a sampling, like the router's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.conds
import torch
from torch import Tensor, nn

from ...composition.features import MarkedFeatures, mark, marks_of, plain
from ...composition.masks import RegionError
from ...composition.places import FOUND_AT, Places
from ...composition.regions import (
    Region,
    RegionalAttention,
    RegionPrompts,
    check_count,
    said_in,
)
from ...composition.routing import Route, Router
from ...concept.errors import IncompatibleModelError
from .routing import CONTEXT, Routing, check_routes, marking_clip

REGIONS = "custom_diffusion_regions"
"""In a conditioning: the key of the node whose regions it has"""


@dataclass(frozen=True)
class AppliedRegions:
    """What Apply Regions hands on."""

    model: Any
    clip: Any
    positive: Any
    """CONDITIONING of the whole picture"""
    places: Places
    """Where the regions are; of those that are found, after a sampling"""
    remarks: tuple[str, ...]
    """What its user should know"""


def apply_regions(
    model: Any,
    clip: Any,
    prompt: str,
    regions: Sequence[Region],
    found_at: float = FOUND_AT,
) -> AppliedRegions:
    """A MODEL and CLIP that know the regions' concepts, and the prompt with its regions. Those
    without a mask are found in the first part of a sampling, until `found_at`.
    """
    check_count(regions)
    if regional_routing(model) is not None:
        raise IncompatibleModelError(
            "This MODEL has regions already. Give all regions to one Apply Regions, and connect "
            "the MODEL that goes into it."
        )
    routes = [region.route for region in regions if region.route is not None]
    check_routes(model, clip, routes)
    feathers = [region.feather for region in regions]
    places = Places([region.mask for region in regions], feathers, found_at)
    routing = RegionalRouting(routes, places)
    knowing, remarks = marking_clip(clip, routing.concepts)
    keys = {id(route): key for key, route in routing.routes.items()}
    for region in regions:
        said = said_in(region, prompt, regions)
        features, pooled = knowing.encode_from_tokens(knowing.tokenize(said), return_pooled=True)
        routing.say(Said(said, features, pooled, keys.get(id(region.route))))
    conditioning = knowing.encode_from_tokens_scheduled(knowing.tokenize(prompt))
    routing.columns(features for features, _ in conditioning)
    placed = [[features, {**options, REGIONS: routing.key}] for features, options in conditioning]
    told = (*remarks, *routing.remarks())
    return AppliedRegions(routing.on(model), knowing, placed, places, told)


def regional_routing(model: Any) -> RegionalRouting | None:
    """The one whose regions a MODEL draws."""
    listed = [w for by_key in model.wrappers.values() for ws in by_key.values() for w in ws]
    owners = (getattr(wrapper, "__self__", None) for wrapper in listed)
    return next((owner for owner in owners if isinstance(owner, RegionalRouting)), None)


@dataclass(frozen=True)
class Said:
    """A region's prompt, encoded."""

    prompt: str
    features: MarkedFeatures | Tensor
    pooled: Tensor | None
    key: str | None
    """Of the route of its concept"""


class RegionalRouting(Routing):
    """The routes of one Apply Regions, and its regions."""

    def __init__(self, routes: Sequence[Route], places: Places) -> None:
        super().__init__(routes)
        self.places = places
        self._sigmas = torch.zeros(0)
        self._flag = f"{self.key}_regions"
        self._said: list[Said] = []
        self._numbers: Sequence[Tensor] = ()
        self._columns: Sequence[Sequence[int]] = ()
        self._attentions: dict[Router, RegionalAttention] = {}

    def say(self, said: Said) -> None:
        """What the next region says."""
        self._said.append(said)

    def subjects(self, positive: Any) -> Iterator[Any]:
        """A CONDITIONING of each region's prompt alone, at which its own concept acts; otherwise as
        the prompt with regions is.
        """
        for said in self._said:
            own = {key: rows for key in self.routes if (rows := self._own(said, key)).any()}
            features = mark(plain(said.features), own)
            alone = []
            for _, options in positive:
                kept = {name: value for name, value in options.items() if name != REGIONS}
                alone.append([features, {**kept, "pooled_output": said.pooled}])
            yield alone

    def columns(self, prompts: Iterable[Tensor]) -> list[list[int]]:
        """Of each region that is found: where in one of these prompts of the whole picture its
        concept's words are. Raises RegionError where they are in none.
        """
        marks = [marks_of(features) for features in prompts]
        found = []
        for number in self.places.sought:
            key = self._said[number].key or ""
            rows = [own[key][0].any(-1).nonzero()[:, 0].tolist() for own in marks if key in own]
            if not any(rows):
                raise RegionError(
                    f"Region {number + 1} has no place, so it is found by the words of "
                    f"{self.routes[key].concept.describe()}, and the prompt for the whole picture "
                    "has none of them. Write them there, or give the region a mask or a box."
                )
            found.append(next(one for one in rows if one))
        return found

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

    def _own(self, said: Said, key: str) -> Tensor:
        features = plain(said.features)
        if key != said.key:
            return torch.zeros_like(features)
        if self.routes[key].concept.scope == "every word":
            return features
        return marks_of(said.features).get(key, torch.zeros_like(features))

    def numbered_beside(self, numbers: Sequence[Tensor]) -> None:
        self._numbers = numbers

    def progress(self, t: Tensor) -> float:
        """How much of the sampling is done at this noise: 0 at its first step."""
        done = int((self._sigmas[:-1] > float(t.flatten()[0]) * (1 + 1e-4)).sum())
        return done / max(len(self._sigmas) - 1, 1)

    def sample(self, executor: Any, guider: Any, sigmas: Tensor, *args: Any, **kwargs: Any) -> Any:
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
        self._sigmas = sigmas.detach().float().cpu()
        self.places.begin()
        self._columns = self.columns(one["model_conds"][CONTEXT].cond for one in placed)
        return super().sample(executor, guider, sigmas, *args, **kwargs)

    def beside_numbers(self, condition: Mapping[str, Any]) -> Mapping[str, Any]:
        has = float(condition.get(REGIONS) == self.key)
        return {self._flag: comfy.conds.CONDRegular(torch.tensor([[has]]))}

    def hook(self, model: Any, router: Router, device: torch.device, dtype: torch.dtype) -> None:
        attention = RegionalAttention(router, _attend)
        contexts = [plain(said.features)[0] for said in self._said]
        index = [one[0] for one in self._numbers]
        said = RegionPrompts(contexts, self.places, index, self._columns)
        attention.sets = [said.to(device, dtype)]
        self._attentions[router] = attention
        self.hooks.callback(self._attentions.pop, router, None)
        for name, module in model.diffusion_model.named_modules():
            if name.endswith(".attn2"):
                handle = module.register_forward_hook(attention.hook, with_kwargs=True)
                self.hooks.callback(handle.remove)

    @contextmanager
    def looking(
        self, router: Router, x: Tensor, t: Tensor, given: Mapping[str, Any]
    ) -> Iterator[None]:
        attention = self._attentions[router]
        attention.settle(self.progress(t))
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
