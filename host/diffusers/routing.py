"""Token routing and regions in a pipeline's UNet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...composition.masks import RegionError
from ...composition.places import FOUND_AT, Places
from ...composition.regions import Region, RegionalAttention, RegionPrompts, said_in
from ...composition.routing import Route, Router, RowChanges, number_rows, own_rows
from ...concept.layers import is_cross_attention, layer_from_diffusers
from ..clip.chunks import Encoder, chunks_of, encode_prompts, words_of

_NO_ROUTE = object()
"""Stands for the route of a region without a concept"""


@contextmanager
def routing(pipeline: Any) -> Iterator[Router]:
    """The pipeline's UNet with a router at its key and value projections; afterwards without."""
    router = Router()
    with ExitStack() as hooks:
        for path, module in pipeline.unet.named_modules():
            if is_cross_attention(path):
                handle = module.register_forward_hook(router.hook(layer_from_diffusers(path)))
                hooks.callback(handle.remove)
        yield router


@contextmanager
def regional(pipeline: Any, router: Router) -> Iterator[RegionalAttention]:
    """The pipeline's UNet with cross-attention that may look at regions; afterwards without."""
    attention = RegionalAttention(router, _attend)
    last = len(pipeline.scheduler.alphas_cumprod) - 1

    def begins(module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        attention.settle(1 - float(args[1][0]) / last)

    with ExitStack() as hooks:
        handle = pipeline.unet.register_forward_pre_hook(begins, with_kwargs=True)
        hooks.callback(handle.remove)
        for path, module in pipeline.unet.named_modules():
            if path.endswith(".attn2"):
                handle = module.register_forward_hook(attention.hook, with_kwargs=True)
                hooks.callback(handle.remove)
        yield attention


def _attend(module: nn.Module, x: Tensor, context: Tensor, named: Mapping[str, Any]) -> Tensor:
    # Past the hooks, which would look at regions again.
    out: Tensor = module.forward(x, **{**named, "encoder_hidden_states": context})
    return out


@torch.no_grad()
def route(
    router: Router,
    routes: Sequence[Route],
    encoder: Encoder,
    prompts: Sequence[str],
    context: Tensor,
    regions: Sequence[Sequence[Region]] = (),
    found_at: float = FOUND_AT,
) -> list[RegionPrompts]:
    """Prepares the router for the features (b, n, d) of these prompts, as `encode_prompts` makes
    them: prompts of fewer chunks are repeated.

    `regions` has a list for each of the first prompts, and their routes are among `routes`;
    returned is what each list says.

    Raises RegionError for a place that is sought by words that the prompt does not have.
    """
    flat = [
        (region, said_in(region, prompt, listed))
        for prompt, listed in zip(prompts, regions, strict=False)
        for region in listed
    ]
    texts = [encode_prompts(encoder, [said]) for _, said in flat]
    encoded = [text.context.to(context) for text in texts]
    own = [
        _own(routes, encoder, prompts, context),
        *(
            _own(routes, encoder, [said], features, region.route or _NO_ROUTE)
            for (region, said), features in zip(flat, encoded, strict=True)
        ),
    ]
    if routes:
        (router.index, *indices), rows = number_rows(own)
        router.changes = RowChanges.of(routes, rows).to(context.device, torch.float32)
    else:
        indices = [torch.zeros(features.shape[:2], dtype=torch.long) for features in encoded]
    said = iter(zip(texts, encoded, indices, strict=True))
    sets = []
    for prompt, listed in zip(prompts, regions, strict=False):
        own_said = [next(said) for _ in listed]
        places = Places(
            [region.mask for region in listed], [region.feather for region in listed], found_at
        )
        said_here = RegionPrompts(
            [features[0] for _, features, _ in own_said],
            places,
            [index[0] for _, _, index in own_said],
            [_columns(region, encoder, prompt) for region in listed if region.mask is None],
            [None if text.pooled is None else text.pooled[0] for text, _, _ in own_said],
        )
        sets.append(said_here.to(context.device, context.dtype))
    return sets


def _columns(region: Region, encoder: Encoder, prompt: str) -> list[int]:
    """The rows of a prompt's first features that are words of a region's concept."""
    token_ids, places = words_of(prompt, encoder)
    concept = region.route.concept if region.route is not None else None
    found = own_rows(concept, encoder, token_ids) if concept is not None else []
    if concept is None or not found:
        raise RegionError(
            "A region without a mask is found by its concept's words, and the prompt "
            f"{prompt[:80]!r} has none. Write them there, or give the region a mask."
        )
    return [places[word] for word in found]


def _own(
    routes: Sequence[Route],
    encoder: Encoder,
    prompts: Sequence[str],
    context: Tensor,
    only: object = None,
) -> list[Tensor]:
    """(b, n, d) of each route: the features of its own rows, zero elsewhere; in the prompt of a
    region `only` its own route acts, and one that was taught through every word at every row.
    """
    own = [torch.zeros_like(context) for _ in routes]
    for b, prompt in enumerate(prompts):
        token_ids, places = words_of(prompt, encoder)
        length = len(chunks_of(prompt, encoder)) * encoder.context_length
        for route, rows in zip(routes, own, strict=True):
            if route is only and route.concept.scope == "every word":
                rows[b] = context[b]
            elif only is None or route is only:
                found = [places[word] for word in own_rows(route.concept, encoder, token_ids)]
                for first in range(0, context.shape[1], length):
                    positions = [first + place for place in found]
                    rows[b, positions] = context[b, positions]
    return own
