"""Text features of a step: those of whole prompts, with gradients where any can come back."""

from __future__ import annotations

import pytest
import torch
from custom_diffusion.concept.text import TextFeatures
from custom_diffusion.host.clip.chunks import encode_prompts
from custom_diffusion.host.diffusers.lending import borrowed_models
from custom_diffusion.trainer.config import GradientCut
from custom_diffusion.trainer.learning.prompt_features import PromptFeatures
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from support.kept import kept_bytes
from torch import Tensor, nn

TOKEN = "<new1>"
PROMPTS = [f"photo of a {TOKEN} cat", f"a very small {TOKEN} cat, far away, in rain", "a dog"]
TOO_LONG = f"{TOKEN} cat and dog " * 30


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("prompts", [PROMPTS, [TOO_LONG, *PROMPTS]], ids=["short", "long"])
def test_padding_needs_no_gradients(
    pipeline: StableDiffusionPipeline,
    xl_pipeline: StableDiffusionXLPipeline,
    kind: str,
    prompts: list[str],
) -> None:
    """Against whole prompts with the gradients of padding and of the start set to zero."""
    used = pipeline if kind == "sd15" else xl_pipeline
    texts = [used.text_encoder] + ([used.text_encoder_2] if kind == "sdxl" else [])
    weights = [weight for model in texts for weight in model.parameters()]
    draw = torch.Generator().manual_seed(0)
    with borrowed_models(used) as models:
        encoder = models.text_encoder
        rows = {
            name: nn.Parameter(torch.randn(row.shape, generator=draw))
            for name, row in encoder.vocabulary_row(encoder.piece_id("cat</w>")).items()
        }
        knowing = encoder.with_tokens({name: {TOKEN: row} for name, row in rows.items()})

        def encoded(cut: GradientCut) -> tuple[TextFeatures, Tensor | None, int]:
            prompt_features = PromptFeatures(knowing, {"any": [TOKEN]}, cut)
            with kept_bytes(weights) as kept:
                features, keep, _ = prompt_features.encode(prompts)
            return features, keep, kept[0]

        short, keep, kept = encoded("start and padding")
        whole, _, kept_of_whole = encoded("none")

    assert keep is not None
    directions = [torch.randn(t.shape, generator=draw) for t in whole if t is not None]
    directions[0] *= keep[:, :, None]

    def gradients(features: TextFeatures) -> tuple[Tensor, ...]:
        given = [tensor for tensor in features if tensor is not None]
        return torch.autograd.grad(given, list(rows.values()), directions)

    assert all(
        torch.equal(one, other)
        for one, other in zip(short, whole, strict=True)
        if one is not None and other is not None
    )
    for found, wanted in zip(gradients(short), gradients(whole), strict=True):
        assert wanted.any()
        assert (found - wanted).norm() < 1e-4 * wanted.norm()
    assert kept < 0.5 * kept_of_whole or TOO_LONG in prompts


def test_long_prompts_are_read_in_chunks_as_a_host_does(
    pipeline: StableDiffusionPipeline, xl_pipeline: StableDiffusionXLPipeline
) -> None:
    """Against the encoding that both hosts draw with; a subject that a chunk's end divides."""
    divided = "dog " * 74 + f"{TOKEN} cat " + "bird " * 80
    prompts = [*PROMPTS, divided, TOO_LONG]
    for used in (pipeline, xl_pipeline):
        with borrowed_models(used) as models:
            encoder = models.text_encoder
            row = encoder.vocabulary_row(encoder.piece_id("cat</w>"))
            knowing = encoder.with_tokens({name: {TOKEN: row[name]} for name in row})
            wanted = encode_prompts(knowing, prompts)
            features = PromptFeatures(knowing, {"any": [TOKEN]}, "own words", [(TOKEN, "cat")])
            found = features.encode(prompts)
            one = features.encode(prompts[:1])
        assert found.features.context.shape[1] == 6 * 77  # of one, two and three chunks
        torch.testing.assert_close(found.features.context, wanted.context, rtol=1e-4, atol=1e-4)
        if wanted.pooled is not None:
            torch.testing.assert_close(found.features.pooled, wanted.pooled, rtol=1e-4, atol=1e-4)
        assert torch.equal(one.features.context[0].repeat(6, 1), found.features.context[0])
        assert found.own is not None and found.passing is not None
        columns = (75, 78)  # the last of one chunk, and the first word of the next
        assert found.own[3].nonzero().flatten().tolist() == [
            number * 3 * 77 + column for number in range(2) for column in columns
        ]
        passing = found.passing[3].reshape(2, 3, 77)
        assert not passing[..., 0].any()
        assert passing.sum((0, 2)).tolist() == [2 * 76, 2 * 76, 2 * 7]
        rows = features.word_rows(prompts, found.features.context)
        assert rows.shape == (5, 2, 6 * 77)
        assert rows[3, 0].nonzero().flatten().tolist() == [75, 75 + 3 * 77]
        assert rows[3, 1].nonzero().flatten().tolist() == [78, 78 + 3 * 77]
