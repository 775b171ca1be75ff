"""Routing in a pipeline's UNet, judged by projections that are computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from custom_diffusion.composition.routing import Route
from custom_diffusion.concept.layers import layer_from_diffusers
from custom_diffusion.host.clip.chunks import encode_prompts
from custom_diffusion.host.diffusers.lending import text_encoder
from custom_diffusion.host.diffusers.routing import route, routing
from custom_diffusion.host.diffusers.sampling import sample
from support.made_concepts import concept_for
from support.tiny_models import tiny_pipeline
from torch import Tensor

SHORT = (
    ["<new1> cat, a cat and <new2> dog", "<new2> cat"],
    {"<new1>": [(0, 1), (0, 2)], "<new2>": [(0, 7), (0, 8), (1, 1)]},
)
"""Prompts; token → (prompt, position), 0 is the start"""
LONG = (
    ["x " * 80 + "<new1> cat", "<new2> cat"],
    {"<new1>": [(0, 83), (0, 84)], "<new2>": [(1, 1), (1, 78)]},
)
"""75 words fill a chunk of 77 positions; the shorter prompt is repeated"""


@pytest.mark.parametrize(("prompts", "places"), [SHORT, LONG], ids=["short", "long"])
@torch.no_grad()
def test_each_row_gets_what_its_concept_adds(
    prompts: list[str], places: dict[str, list[tuple[int, int]]]
) -> None:
    pipeline = tiny_pipeline()
    concepts = [
        concept_for(pipeline, "<new1>", "cat", 1),
        concept_for(pipeline, "<new2>", "dog", 2),
    ]
    routes = [Route(concepts[0], 0.5), Route(concepts[1], -1.0)]
    encoder = text_encoder(pipeline)
    for one in concepts:
        encoder = encoder.with_tokens(one.embeddings())
    context = encode_prompts(encoder, prompts).context
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def predict() -> Tensor:
        return pipeline.unet(latents, torch.tensor([500]), encoder_hidden_states=context).sample

    base = predict()
    with routing(pipeline) as router:
        route(router, routes, encoder, prompts, context)
        ours = predict()
    assert torch.equal(predict(), base)

    handles = []
    for name, module in pipeline.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            layer = layer_from_diffusers(name)

            def add(_: Any, inputs: Any, output: Tensor, layer: str = layer) -> Tensor:
                output = output.clone()
                for one in routes:
                    for b, j in places[one.concept.tokens[0].name]:
                        delta = one.concept.deltas[layer].dense()
                        output[b, j] += one.strength * delta @ inputs[0][b, j]
                return output

            handles.append(module.register_forward_hook(add))
    wanted = predict()
    for handle in handles:
        handle.remove()
    print(f"differs by {(ours - wanted).abs().max():.1e} of {(base - wanted).abs().max():.1e}")
    assert torch.allclose(ours, wanted, atol=1e-5)
    assert not torch.allclose(base, wanted, atol=1e-3)


def test_a_word_far_into_a_prompt_is_drawn() -> None:
    """And weighs what its brackets say."""
    pipeline = tiny_pipeline()
    one = concept_for(pipeline, "<new1>", "cat", 1)

    def drawn(prompt: str) -> Tensor:
        return sample(pipeline, [prompt], one, strength=0.0, resolution=64, steps=2)

    far = "x " * 90
    without = drawn(f"{far} cat")
    assert not torch.allclose(drawn(f"{far} <new1> cat"), without, atol=1e-3)
    assert not torch.allclose(drawn(f"{far} (<new1>:2) cat"), drawn(f"{far} <new1> cat"), atol=1e-4)
