"""Sampling in ComfyUI with routed concepts, and with networks whose projections are computed by
hand: W₀ c + m ⊙ (D c), with m written down in each test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from custom_diffusion.composition.routing import Route
from custom_diffusion.concept.concept import Concept
from torch import Tensor

Conditioning = list[Any]
Hand = tuple[Concept, float, Mapping[int, float]]
"""Concept, strength, and how much of it each row of the features holds: by hand."""


def route(model: Any, clip: Any, *concepts: Concept | Route) -> tuple[Any, Any]:
    return noted(model, clip, *concepts)[:2]


def noted(model: Any, clip: Any, *concepts: Concept | Route) -> tuple[Any, Any, tuple[str, ...]]:
    from custom_diffusion.host.comfyui.routing import route_concepts

    routes = [one if isinstance(one, Route) else Route(one) for one in concepts]
    with torch.inference_mode():
        return route_concepts(model, clip, routes)


def encode(clip: Any, text: str, **more: Any) -> Conditioning:
    with torch.inference_mode():
        return [
            [features, {**rest, **more}]
            for features, rest in clip.encode_from_tokens_scheduled(clip.tokenize(text))
        ]


def sample(
    model: Any,
    positive: Conditioning,
    negative: Conditioning,
    batch: int = 1,
    steps: int = 2,
    size: tuple[int, int] = (8, 8),
) -> Tensor:
    """What Euler's method makes of seeded noise."""
    import comfy.samplers

    noise = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(3.0)
        sigmas = comfy.samplers.calculate_sigmas(
            model.get_model_object("model_sampling"), "normal", steps
        )
        sampler = comfy.samplers.sampler_object("euler")
        latent = torch.zeros_like(noise)
        return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=0).clone()


Table = Sequence[tuple[Tensor, list[tuple[Tensor, Tensor]]]]
"""Prompts, told apart by their features (n, d), each with D and m ⊙ c of what acts on it."""


def projected(base: Callable[[Tensor], Tensor], table: Table, context: Tensor) -> Tensor:
    """Keys or values of a batch of prompts; ComfyUI repeats the shorter ones."""
    changed = []
    for rows, out in zip(context, base(context), strict=True):
        for features, changes in table:
            times, left = divmod(len(rows), len(features))
            if not left and torch.allclose(features.to(rows).repeat(times, 1), rows, atol=1e-6):
                for delta, own in changes:
                    out = out + (own.repeat(times, 1) @ delta.T).to(out)
                break
        changed.append(out)
    return torch.stack(changed)


@contextmanager
def by_hand(model: Any, *prompts: tuple[Tensor, Sequence[Hand]]) -> Iterator[None]:
    """The MODEL's network with every projection computed by hand for these features (1, n, d)."""
    network = model.model.diffusion_model
    layers = [n for n, _ in network.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    modules = []
    for layer in layers:
        table = []
        for features, hands in prompts:
            rows = features.as_subclass(Tensor)[0].float()
            changes = []
            for concept, strength, mask in hands:
                m = torch.zeros(len(rows), 1)
                for row, share in mask.items():
                    m[row] = share
                changes.append((strength * concept.deltas[layer].dense().float(), m * rows))
            table.append((rows, changes))
        module = network.get_submodule(layer)
        module.forward = partial(projected, module.forward, table)
        modules.append(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def base_clip(clip: Any, *concepts: Concept) -> Any:
    """A CLIP that knows the words and marks nothing."""
    from custom_diffusion.host.comfyui.tokenizer import with_concept_tokens

    knowing = clip.clone()
    for concept in concepts:
        knowing.tokenizer = with_concept_tokens(knowing.tokenizer, concept)
    return knowing


def close(ours: Tensor, wanted: Tensor, base: Tensor) -> None:
    """Equal to rounding, and far from what the model draws without concepts."""
    difference = float((ours - wanted).abs().max() / wanted.abs().max())
    effect = float((wanted - base).abs().max() / wanted.abs().max())
    print(f"differs by {difference:.1e}, the concepts by {effect:.1e}")
    assert difference < 2e-5
    assert effect > 100 * difference and effect > 1e-3
