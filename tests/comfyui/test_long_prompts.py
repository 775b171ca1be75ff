"""Long and weighted prompts: ComfyUI's own tokenizer and text models judge, on the same weights."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.concept import Concept, ModifierToken
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.host.clip.chunks import chunks_of, encode_prompts
from safetensors.torch import save_file
from support.comfy_xl import comfy_xl_clip
from torch import Tensor

VECTORS = {"<one>": 1, "<few>": 5, "<many>": 12}
PLAIN = "photo of a cat in the snow, oil on canvas, by a painter whose name nobody remembers "
PROMPTS = (
    "",
    "a <one> cat",
    "(a <one> cat:1.3), ((dog)) and a [bird] \\(really\\)",
    PLAIN * 6 + "<one> cat",
    PLAIN * 4 + "x x x x <few> cat",
    PLAIN * 4 + "(<few> cat:1.2), <many> (dog:0.5)",
    "(((unclosed) <few>",
    "closed) too (early:",
    "(a:b:1.1)(:2)()(c: 0.7 )",
)
PIECES = (
    *("a ", "cat ", "photo of ", "naïve ", "(", ")", "((", "))", ":1.2)", ":-0.5)", ":x)", ":)"),
    *("\\(", "\\)", "\\", ":", "\n", ", ", "<one> ", "<few> ", "(<few>:1.4)", "<many>", PLAIN * 3),
)


def concept(family: str) -> Concept:
    draw = torch.Generator().manual_seed(0)
    encoders = FAMILIES[family].text_encoders
    tokens = tuple(
        ModifierToken(
            name,
            "cat",
            {e: torch.randn(count, width, generator=draw) for e, width in encoders.items()},
        )
        for name, count in VECTORS.items()
    )
    return Concept(FAMILIES[family], {}, tokens)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def both(request: Any, comfy: Any, embeddings_folder: Path, load: Any) -> tuple[Any, Any]:
    """A CLIP that knows the words, and the pack's encoder that does."""
    from custom_diffusion.host.comfyui.models.text import text_encoder
    from custom_diffusion.host.comfyui.tokenizer import with_concept_tokens

    family = str(request.param)
    clip = load("sd15").clip if family == "sd15" else comfy_xl_clip(comfy, [str(embeddings_folder)])
    words = concept(family)
    with torch.inference_mode():
        encoder = text_encoder(clip).with_tokens(words.embeddings())
    knowing = clip.clone()
    knowing.tokenizer = with_concept_tokens(clip.tokenizer, words)
    return knowing, encoder


def numbered(chunks: Sequence[Any], rows: Sequence[Tensor]) -> list[list[Any]]:
    """Tokens and weights; a row of a word as its number among all rows."""
    known = {id(row): -1 - number for number, row in enumerate(rows)}
    return [[(known.get(id(t), t), w) for t, w in chunk] for chunk in chunks]


def by_comfyui(clip: Any, prompt: str) -> list[list[Any]]:
    from custom_diffusion.host.comfyui.tokenizer import rows_of_words

    tokenizer = clip.tokenizer.clip_l
    rows = [row for rows in rows_of_words(tokenizer).values() for row in rows]
    return numbered(tokenizer.tokenize_with_weights(prompt), rows)


def by_us(encoder: Any, prompt: str) -> list[list[Any]]:
    start, end = encoder.tokenize("")
    first = encoder.tokenize_words("<one>")[0]
    result = []
    for chunk in chunks_of(prompt, encoder):
        ids = [(first - t - 1 if t >= first else t, weight) for t, weight in chunk]
        padding = [(end, 1.0)] * (encoder.context_length - 1 - len(ids))
        result.append([(start, 1.0), *ids, *padding])
    return result


def test_prompts_are_divided_and_weighed_as_by_comfyui(both: tuple[Any, Any]) -> None:
    clip, encoder = both
    draw = random.Random(0)
    random_prompts = ["".join(draw.choices(PIECES, k=draw.randrange(1, 40))) for _ in range(1000)]
    longest = 0
    for prompt in (*PROMPTS, *random_prompts):
        ours = by_us(encoder, prompt)
        assert ours == by_comfyui(clip, prompt), prompt
        longest = max(longest, len(ours))
    assert longest > 4


def test_features_are_comfyuis(both: tuple[Any, Any]) -> None:
    clip, encoder = both
    largest = 0.0
    for prompt in PROMPTS:
        with torch.inference_mode():
            wanted, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
            ours = encode_prompts(encoder, [prompt])
        assert ours.context.shape == wanted.shape
        largest = max(largest, float((ours.context - wanted).norm() / wanted.norm()))
        if ours.pooled is not None:
            assert torch.allclose(ours.pooled, pooled.float(), atol=1e-3, rtol=1e-3)
    print(f"context differs by at most {largest:.1e} of its norm, {len(PROMPTS)} prompts")
    assert largest < 1e-3


def test_a_training_reads_long_captions_as_comfyui_does(both: tuple[Any, Any]) -> None:
    from custom_diffusion.trainer.learning.prompt_features import PromptFeatures

    clip, encoder = both
    captions = ["a <one> cat", PLAIN * 6 + "<one> cat", "<one> cat " + PLAIN * 12]
    for caption in captions:
        ours = PromptFeatures(encoder, {"any": ["<one>"]}, "start").encode([caption]).features
        with torch.inference_mode():
            wanted, pooled = clip.encode_from_tokens(clip.tokenize(caption), return_pooled=True)
        assert ours.context.shape == wanted.shape
        assert (ours.context - wanted).norm() < 1e-3 * wanted.norm()
        if ours.pooled is not None:
            assert torch.allclose(ours.pooled, pooled.float(), atol=1e-3, rtol=1e-3)


def test_prompts_of_several_lengths_are_as_long_as_each_other(both: tuple[Any, Any]) -> None:
    _, encoder = both
    prompts = [PLAIN * 10, "a cat", PLAIN * 6]
    counts = [len(chunks_of(prompt, encoder)) for prompt in prompts]
    assert counts == [3, 1, 2]
    context, _ = encode_prompts(encoder, prompts)
    assert context.shape[1] == 6 * 77
    for row, prompt, count in zip(context, prompts, counts, strict=True):
        (alone,) = encode_prompts(encoder, [prompt]).context
        for part in row.split(77 * count):
            torch.testing.assert_close(part, alone, atol=1e-4, rtol=1e-4)


def test_a_word_of_several_vectors_stands_as_an_embedding_does(
    comfy: Any, load: Any, embeddings_folder: Path
) -> None:
    """A file of the same vectors in ComfyUI's own folder of embeddings is the judge."""
    from custom_diffusion.host.comfyui.tokenizer import with_concept_tokens

    words = concept("sd15")
    clip = load("sd15").clip
    knowing = with_concept_tokens(clip.tokenizer, words).clip_l
    for token in words.tokens:
        file = embeddings_folder / f"{token.name.strip('<>')}.safetensors"
        save_file({"emb_params": token.embeddings["clip_l"]}, file)
    divided = 0
    for name in ("few", "many"):
        for before in range(60, 80):
            prompt = f"{'x ' * before}{{}} cat"
            ours = knowing.tokenize_with_weights(prompt.format(f"<{name}>"))
            theirs = clip.tokenizer.clip_l.tokenize_with_weights(prompt.format(f"embedding:{name}"))
            assert [len(chunk) for chunk in ours] == [len(chunk) for chunk in theirs]
            for one, other in zip(ours, theirs, strict=True):
                for (token, weight), (judge, judged) in zip(one, other, strict=True):
                    assert weight == judged
                    same = (
                        torch.equal(token, judge) if isinstance(token, Tensor) else token == judge
                    )
                    assert same
            vectors = [sum(isinstance(t, Tensor) for t, _ in chunk) for chunk in ours]
            divided += name == "many" and 0 < vectors[0] < VECTORS["<many>"]
            assert name == "many" or vectors[0] in (0, VECTORS["<few>"])
    assert divided
