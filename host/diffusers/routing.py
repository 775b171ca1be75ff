"""Token routing in a pipeline's UNet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ...composition.routing import Route, Router, RowChanges, number_rows, own_rows
from ...concept.layers import is_cross_attention, layer_from_diffusers
from ..clip.chunks import Encoder, chunks_of, words_of


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


@torch.no_grad()
def route(
    router: Router,
    routes: Sequence[Route],
    encoder: Encoder,
    prompts: Sequence[str],
    context: Tensor,
) -> None:
    """Prepares the router for the features (b, n, d) of these prompts, as `encode_prompts` makes
    them: prompts of fewer chunks are repeated.
    """
    own = [torch.zeros_like(context) for _ in routes]
    for b, prompt in enumerate(prompts):
        token_ids, places = words_of(prompt, encoder)
        length = len(chunks_of(prompt, encoder)) * encoder.context_length
        for route, rows in zip(routes, own, strict=True):
            found = [places[word] for word in own_rows(route.concept, encoder, token_ids)]
            for first in range(0, context.shape[1], length):
                positions = [first + place for place in found]
                rows[b, positions] = context[b, positions]
    (router.index,), features = number_rows([own])
    router.changes = RowChanges.of(routes, features).to(context.device, torch.float32)
