"""Routing in a pipeline's UNet, judged by projections that are computed by hand."""

from __future__ import annotations

from typing import Any

import torch
from custom_diffusion.composition.routing import Route
from custom_diffusion.concept.layers import layer_from_diffusers
from custom_diffusion.host.diffusers.lending import text_encoder
from custom_diffusion.host.diffusers.routing import route, routing
from support.made_concepts import concept_for
from support.tiny_models import tiny_pipeline
from torch import Tensor

PROMPTS = ["<new1> cat, a cat and <new2> dog", "<new2> cat"]
OWN = {"<new1>": [(0, 1), (0, 2)], "<new2>": [(0, 7), (0, 8), (1, 1)]}
"""Token → (prompt, position), 0 is the start"""


@torch.no_grad()
def test_each_row_gets_what_its_concept_adds() -> None:
    pipeline = tiny_pipeline()
    concepts = [
        concept_for(pipeline, "<new1>", "cat", 1),
        concept_for(pipeline, "<new2>", "dog", 2),
    ]
    routes = [Route(concepts[0], 0.5), Route(concepts[1], -1.0)]
    encoder = text_encoder(pipeline)
    for one in concepts:
        encoder = encoder.with_tokens(one.embeddings())
    context = encoder.encode(encoder.pad([encoder.tokenize(prompt) for prompt in PROMPTS]))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def predict() -> Tensor:
        return pipeline.unet(latents, torch.tensor([500]), encoder_hidden_states=context).sample

    base = predict()
    with routing(pipeline) as router:
        route(router, routes, encoder, PROMPTS, context)
        ours = predict()
    assert torch.equal(predict(), base)

    handles = []
    for name, module in pipeline.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            layer = layer_from_diffusers(name)

            def add(_: Any, inputs: Any, output: Tensor, layer: str = layer) -> Tensor:
                output = output.clone()
                for one in routes:
                    for b, j in OWN[one.concept.tokens[0].name]:
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
