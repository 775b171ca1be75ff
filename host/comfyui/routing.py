"""Token routing in ComfyUI: concepts that act at their own words alone, and nothing is merged.

The CLIP's prompts come with marks (`marking.py`). When a sampler begins, what each marked row adds
to keys and values is computed once; the conditions get the numbers of their rows beside their
features, so ComfyUI repeats, batches and orders both alike. While it samples, hooks at the
projections look the rows up. They are there for as long as a sampling lasts and no longer: another
clone of the model, or the model unloaded, never meets them.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import combinations
from typing import Any
from weakref import WeakKeyDictionary

import comfy.conds
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...composition.features import mark, marks_of, plain
from ...composition.routing import Route, Router, RowChanges, number_rows, own_words
from ...composition.timing import WHOLE, Span
from ...concept.concept import Concept
from ...concept.errors import IncompatibleModelError
from ...concept.layers import is_projection
from ...concept.prompts import subject
from .apply import check_models, text_remarks
from .marking import MarkingTextModel, Words
from .models.text import encoder_names
from .timed_clip import timed_clip
from .tokenizer import with_concept_tokens
from .unknown_words import executing_node, tell_node

CONTEXT = "c_crossattn"  # where ComfyUI keeps a prompt's features among what a model is given


def route_concepts(
    model: Any, clip: Any, routes: Sequence[Route], span: Span = WHOLE
) -> tuple[Any, Any, tuple[str, ...]]:
    """Clones of MODEL and CLIP with the concepts, and what their user should know of them.

    Outside the span their words are class words, so that no route acts.
    """
    check_routes(model, clip, routes)
    routing = Routing(routes)
    knowing, remarks = marking_clip(clip, routing.concepts)
    if not span.is_whole:
        knowing = timed_clip(knowing, list(routing.concepts.values()), span)
    return routing.on(model), knowing, remarks


def marking_clip(clip: Any, concepts: Mapping[str, Concept]) -> tuple[Any, tuple[str, ...]]:
    """A clone of a CLIP that knows the concepts by these keys and marks their words, and what its
    user should know.
    """
    knowing = clip.clone()
    for concept in concepts.values():
        knowing.tokenizer = with_concept_tokens(knowing.tokenizer, concept)
    words = [
        Words.of(getattr(knowing.tokenizer, name), name, concepts) for name in encoder_names(clip)
    ]
    knowing.cond_stage_model = MarkingTextModel(clip.cond_stage_model, words)
    return knowing, (*_remarks(concepts, words[0]), *text_remarks(clip, concepts.values()))


class Routing:
    """The routes of one node on one MODEL, and the wrappers with which they take part in sampling.

    The key keeps it apart from other nodes' in prompts, in models and in what a model is given.
    """

    def __init__(self, routes: Sequence[Route]) -> None:
        self.key = f"custom_diffusion_route_{uuid.uuid4().hex}"
        self.routes = {f"{self.key}_{number}": route for number, route in enumerate(routes)}
        # For good: a compiled network refers to the router that it was compiled with.
        self._routers: WeakKeyDictionary[Any, Router] = WeakKeyDictionary()
        self._changes: RowChanges | None = None
        self._hooked: set[Router] = set()
        self._node = executing_node()
        self.hooks = ExitStack()

    @property
    def concepts(self) -> Mapping[str, Concept]:
        return {key: route.concept for key, route in self.routes.items()}

    def on(self, model: Any) -> Any:
        """A clone of the MODEL that samples with the routes."""
        routed = model.clone()
        routed.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, self.key, self.sample)
        routed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, self.key, self.predict)
        return routed

    def sample(self, executor: Any, guider: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a sampler: numbers the rows of all conditions, and hooks last as long as it."""
        self._changes = self._number(guider)
        with ExitStack() as self.hooks:
            try:
                return executor(guider, *args, **kwargs)
            finally:
                self._changes = None

    def predict(self, executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Around every prediction of a network: its rows' numbers are known while it lasts.

        The numbers are passed on: by them a compiled network is told from one without routes.
        """
        numbers = kwargs.get(self.key)
        if numbers is None or self._changes is None:
            return executor(x, *args, **kwargs)
        router = self._router(executor.class_obj, x.device, self._changes)
        router.index = numbers.squeeze(-1).to(x.device)
        try:
            with self.looking(router, x, args[0], kwargs):
                return executor(x, *args, **kwargs)
        finally:
            router.index = None

    @contextmanager
    def looking(
        self, router: Router, x: Tensor, t: Tensor, given: Mapping[str, Any]
    ) -> Iterator[None]:
        """Lasts as long as a prediction at this noise; for those that do more than route."""
        yield

    def hook(self, model: Any, router: Router, device: torch.device, dtype: torch.dtype) -> None:
        """Called once a sampling for each model, when it is loaded; `self.hooks` end with it."""

    def beside_numbers(self, condition: Mapping[str, Any]) -> Mapping[str, Any]:
        """What else a condition's batch is given, as `comfy.conds`; all must get alike."""
        return {}

    def own_beside(self) -> Sequence[Sequence[Tensor]]:
        """Own rows of prompts that no condition has, as `number_rows` takes them."""
        return ()

    def numbered_beside(self, numbers: Sequence[Tensor]) -> None:
        """The numbers of these prompts' rows."""

    def _router(self, model: Any, device: torch.device, changes: RowChanges) -> Router:
        """Of a model that samples; hooked at its first prediction, when it is loaded."""
        router = self._routers.setdefault(model, Router())
        if router not in self._hooked:  # changes may be none: a concept may be words alone
            self._hooked.add(router)
            self.hooks.callback(self._hooked.discard, router)
            dtype = model.manual_cast_dtype or model.get_dtype()
            router.changes = changes.to(device, dtype)
            self.hooks.callback(setattr, router, "changes", RowChanges({}))
            for layer in changes.by_layer:
                module = model.diffusion_model.get_submodule(layer)
                self.hooks.callback(module.register_forward_hook(router.hook(layer)).remove)
            self.hook(model, router, device, dtype)
        return router

    def _number(self, guider: Any) -> RowChanges | None:
        """Gives the conditions of a sampling plain features and their rows' numbers."""
        conditions = {kind: [dict(one) for one in ones] for kind, ones in guider.conds.items()}
        given = [c["model_conds"] for ones in conditions.values() for c in ones]
        prompts = [c[CONTEXT].cond for c in given if CONTEXT in c]
        keys = list(self.routes)
        if not any(key in marks_of(prompt) for prompt in prompts for key in keys):
            raise IncompatibleModelError(
                "No prompt was encoded with the CLIP of Route Concepts, so the places of the "
                "concepts' words are unknown. Connect the CLIP that comes out of the node to the "
                "prompts. Between them and the sampler conditionings may be added, multiplied and "
                "joined, but not changed in another way."
            )
        own = [[marks_of(p).get(key, torch.zeros_like(plain(p))) for key in keys] for p in prompts]
        numbers, rows = number_rows([*own, *self.own_beside()])
        left = iter(numbers)
        for ones in conditions.values():
            for one in ones:
                one["model_conds"] = self._with_numbers(one["model_conds"], left)
                one["model_conds"].update(self.beside_numbers(one))
        self.numbered_beside(list(left))
        guider.conds = conditions
        for concept, found in zip(self.concepts.values(), rows, strict=True):
            if not found.any():
                tell_node(
                    self._node, f"No prompt has the words of {concept.describe()}: it is not drawn."
                )
        return RowChanges.of(list(self.routes.values()), rows)

    def _with_numbers(self, given: Mapping[str, Any], numbers: Iterator[Tensor]) -> dict[str, Any]:
        if CONTEXT not in given:
            return dict(given)
        features = given[CONTEXT].cond
        others = {k: own for k, own in marks_of(features).items() if k not in self.routes}
        unmarked = mark(plain(features), others) if others else plain(features)
        # The numbers are mixed with others' of another length by the rule for features.
        numbered = comfy.conds.CONDCrossAttn(next(numbers).unsqueeze(-1))
        return {**given, CONTEXT: type(given[CONTEXT])(unmarked), self.key: numbered}


def check_routes(model: Any, clip: Any, routes: Sequence[Route]) -> None:
    """Raises IncompatibleModelError where a concept cannot be routed on these models."""
    for route in routes:
        check_models(model, clip, route.concept)
        _check_concept(route.concept, encoder_names(clip))


def _check_concept(concept: Concept, encoders: Sequence[str]) -> None:
    beyond = [layer for layer in concept.layers if not is_projection(layer)]
    if beyond:
        raise IncompatibleModelError(
            f"The concept {concept.describe()} changes more than keys and values ({len(beyond)} "
            f"matrices, {beyond[0]} for one), and only these can be changed at single words. Use "
            "Apply Concept, or train it by 'custom diffusion' or 'low-rank'."
        )
    if not own_words(concept):
        raise IncompatibleModelError(
            f"The concept {concept.describe()} names no word at which it could act: it has no "
            "trigger word and no prompts of its own. Use Apply Concept, or train it again with a "
            "trigger word."
        )
    if set(encoders) != set(concept.family.text_encoders):
        raise IncompatibleModelError(
            f"The concept {concept.describe()} is for the text encoders "
            f"{', '.join(concept.family.text_encoders)}; this CLIP has {', '.join(encoders)}. "
            "Connect the CLIP of the concept's own base model."
        )


def _remarks(concepts: Mapping[str, Concept], words: Words) -> tuple[str, ...]:
    """What is allowed, and may still not draw what its user thinks of."""
    overlaps = words.overlaps()
    return (
        *(
            f"The words of {concepts[a].describe()} and {concepts[b].describe()} overlap: where "
            "they do, both act."
            for a, b in combinations(concepts, 2)
            if (a, b) in overlaps or (b, a) in overlaps
        ),
        *(
            f"{concept.describe()} was not trained at its own words alone (gradient_cut), so part "
            "of it is lost here. Merge it instead, or train it again."
            for concept in concepts.values()
            if concept.scope == "every word"
        ),
    )


def own_phrases(concept: Concept) -> list[str]:
    """The words at which a concept acts, as they are written in prompts."""
    return [subject(token, noun) for token, noun in own_words(concept)]
