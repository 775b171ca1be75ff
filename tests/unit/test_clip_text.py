"""CLIP text models that learn new words, against transformers; where a new word starts."""

from __future__ import annotations

import copy
import zlib
from typing import Any

import pytest
import torch
from custom_diffusion.concept.concept import Concept, ModifierToken
from custom_diffusion.concept.errors import TokenError
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.concept.text import encode_unpadded
from custom_diffusion.host.clip.text_encoder import ClipTextEncoder, text_transformer
from custom_diffusion.trainer.learning.tokens import (
    RARE_PIECES,
    initial_embedding,
    words_to_teach,
)
from support.tiny_models import (
    CONTEXT_WIDTH,
    VOCABULARY_SIZE,
    cat_concept,
    dog_concept,
    same_state,
    state,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

START, END = 49406, 49407
PROMPTS = ["", "photo of a cat", "a cat, a dog and a very long list of other animals!", "Käse"]


@pytest.fixture(scope="module")
def model(pipeline: Any) -> CLIPTextModel:
    return copy.deepcopy(pipeline.text_encoder).requires_grad_(False)


@pytest.fixture
def encoder(model: CLIPTextModel, tokenizer: CLIPTokenizer) -> ClipTextEncoder:
    return ClipTextEncoder("clip_l", model, tokenizer, pad_id=END)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, CONTEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def with_new(encoder: ClipTextEncoder, **vectors: int) -> ClipTextEncoder:
    """The encoder with tokens `<name>` of so many vectors."""
    return encoder.with_tokens(
        {"clip_l": {f"<{name}>": rows(count, seed=count) for name, count in vectors.items()}}
    )


def encode(encoder: ClipTextEncoder, *prompts: str) -> Tensor:
    with torch.no_grad():
        return encoder.encode(encoder.pad([encoder.tokenize(prompt) for prompt in prompts]))


# Plain prompts


def test_ids_are_those_of_the_tokenizer(encoder: ClipTextEncoder, tokenizer: CLIPTokenizer) -> None:
    wanted = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
    ours = encoder.pad([encoder.tokenize(prompt) for prompt in PROMPTS])
    assert torch.equal(ours, wanted.input_ids)


def test_words_have_no_start_and_no_end(encoder: ClipTextEncoder) -> None:
    assert encoder.tokenize_words("cat") == [2368]
    assert encoder.tokenize("cat") == [START, 2368, END]
    assert encoder.tokenize("") == [START, END]
    assert encoder.tokenize_words("") == []


@pytest.mark.parametrize("pad_id", [0, END])
def test_prompts_are_padded_with_the_id_of_the_model(
    model: CLIPTextModel, tokenizer: CLIPTokenizer, pad_id: int
) -> None:
    encoder = ClipTextEncoder("clip_h", model, tokenizer, pad_id=pad_id)
    ids = encoder.pad([encoder.tokenize("cat"), encoder.tokenize("")])
    assert ids.shape == (2, 77)
    assert ids[0].tolist() == [START, 2368, END] + [pad_id] * 74
    assert ids[1].tolist() == [START, END] + [pad_id] * 75


def test_long_prompts_are_cut_and_keep_their_end_token(
    encoder: ClipTextEncoder, tokenizer: CLIPTokenizer
) -> None:
    prompt = "cat dog " * 60
    ids = encoder.tokenize(prompt)
    assert ids == tokenizer(prompt, truncation=True, max_length=77)["input_ids"]
    assert len(ids) == 77
    assert (ids[0], ids[-1]) == (START, END)


def test_a_long_prompt_with_tokens_is_cut_as_well(encoder: ClipTextEncoder) -> None:
    ids = with_new(encoder, a=3).tokenize("<a> cat " * 40)
    assert len(ids) == 77
    assert ids[-1] == END
    assert encode(with_new(encoder, a=3), "<a> cat " * 40).isfinite().all()


def test_features_are_those_of_the_transformers_model(
    encoder: ClipTextEncoder, model: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    ids = tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = model(ids).last_hidden_state
    ours = encode(encoder, *PROMPTS)
    assert ours.shape == (len(PROMPTS), 77, CONTEXT_WIDTH)
    assert torch.equal(ours, wanted)
    assert torch.equal(encode(with_new(encoder, a=2), *PROMPTS), wanted)


def test_clip_skip_is_the_model_without_its_last_layer(
    model: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    """A model that never had the last layer ends with the same final norm."""
    shorter = copy.deepcopy(model)
    transformer = text_transformer(shorter)
    transformer.encoder.layers = transformer.encoder.layers[:-1]
    skipping = ClipTextEncoder("clip_h", model, tokenizer, pad_id=0, hidden_layer=-2)
    plain = ClipTextEncoder("clip_h", shorter, tokenizer, pad_id=0)
    wanted = encode(plain, *PROMPTS)
    torch.testing.assert_close(encode(skipping, *PROMPTS), wanted, atol=1e-5, rtol=1e-5)
    last = ClipTextEncoder("clip_h", model, tokenizer, pad_id=0)
    assert (encode(last, *PROMPTS) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("hidden_layer", [None, -2])
def test_padding_does_not_change_the_words_before_it(
    model: CLIPTextModel, tokenizer: CLIPTokenizer, hidden_layer: int | None
) -> None:
    encoder = with_new(
        ClipTextEncoder("clip_l", model, tokenizer, pad_id=END, hidden_layer=hidden_layer), a=2
    )
    prompts = [*PROMPTS, "photo of a <a> cat", "photo of the <a>"]
    padded = encode(encoder, *prompts)
    unpadded = encode_unpadded(encoder, [encoder.tokenize(prompt) for prompt in prompts], 2)
    for prompt, short, long in zip(prompts, unpadded, padded, strict=True):
        assert len(short) == len(encoder.tokenize(prompt))
        torch.testing.assert_close(short, long[: len(short)], atol=1e-5, rtol=1e-5)


def test_features_are_float32_for_a_half_precision_model(
    model: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    encoder = with_new(ClipTextEncoder("clip_l", half, tokenizer, pad_id=END), a=1)
    features = encode(encoder, "photo of a <a> cat")
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    assert encoder.vocabulary_row(2368)["clip_l"].dtype == torch.float32


# Modifier tokens


def test_tokens_are_found_wherever_they_stand(encoder: ClipTextEncoder) -> None:
    known = with_new(encoder, a=1, b=1)
    a, b = VOCABULARY_SIZE, VOCABULARY_SIZE + 1
    cat, comma, of = (encoder.tokenize_words(word)[0] for word in ("cat", ",", "of"))
    assert known.tokenize_words("<a> cat") == [a, cat]
    assert known.tokenize_words("cat of <a>") == [cat, of, a]
    assert known.tokenize_words("<a>,<b>") == [a, comma, b]
    assert known.tokenize_words("cat,<b>,cat") == [cat, comma, b, comma, cat]
    assert known.tokenize_words("cat<a>cat") == [cat, a, cat]
    assert known.tokenize_words("<b><a><a>") == [b, a, a]
    assert known.tokenize("<a>") == [START, a, END]


def test_a_token_that_begins_like_another_is_not_confused_with_it(
    encoder: ClipTextEncoder,
) -> None:
    known = with_new(encoder, new1=1, new11=1)
    assert known.tokenize_words("<new11> <new1>") == [VOCABULARY_SIZE + 1, VOCABULARY_SIZE]


def test_unknown_tokens_are_ordinary_text(
    encoder: ClipTextEncoder, tokenizer: CLIPTokenizer
) -> None:
    plain = tokenizer("<b> cat")["input_ids"]
    assert with_new(encoder, a=1).tokenize("<b> cat") == plain
    assert encoder.tokenize("<b> cat") == plain
    assert len(plain) > 4


def test_a_token_of_several_vectors_takes_several_positions(encoder: ClipTextEncoder) -> None:
    known = with_new(encoder, a=3, b=2)
    cat = encoder.tokenize_words("cat")[0]
    first = VOCABULARY_SIZE
    assert known.tokenize_words("<b> cat <a>") == [
        first + 3, first + 4, cat, first, first + 1, first + 2,
    ]  # fmt: skip


def test_features_of_tokens_are_those_of_a_model_whose_vocabulary_has_them(
    encoder: ClipTextEncoder, model: CLIPTextModel
) -> None:
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(VOCABULARY_SIZE + 3, mean_resizing=False)
    table = larger.get_input_embeddings().weight
    with torch.no_grad():
        table[VOCABULARY_SIZE : VOCABULARY_SIZE + 2] = rows(2, seed=2)
        table[VOCABULARY_SIZE + 2 :] = rows(1, seed=1)
    known = with_new(encoder, a=2, b=1)
    ids = known.pad([known.tokenize("photo of a <b> cat, <a>"), known.tokenize("<a><b>")])
    with torch.no_grad():
        torch.testing.assert_close(
            known.encode(ids), larger(ids).last_hidden_state, atol=1e-6, rtol=1e-6
        )


def test_tokens_can_be_added_in_turn(encoder: ClipTextEncoder) -> None:
    both = with_new(with_new(encoder, a=2), b=1)
    assert both.tokenize_words("<b><a>") == [
        VOCABULARY_SIZE + 2, VOCABULARY_SIZE, VOCABULARY_SIZE + 1,
    ]  # fmt: skip
    at_once = with_new(encoder, a=2, b=1)
    assert torch.equal(encode(both, "<b> cat <a>"), encode(at_once, "<b> cat <a>"))


def test_adding_tokens_leaves_the_encoder_as_it_was(encoder: ClipTextEncoder) -> None:
    before = encode(encoder, "<a> cat")
    known = with_new(encoder, a=1)
    assert torch.equal(encode(encoder, "<a> cat"), before)
    assert not torch.equal(encode(known, "<a> cat"), before)


def test_a_token_added_twice_is_refused(encoder: ClipTextEncoder) -> None:
    known = with_new(encoder, a=1)
    with pytest.raises(TokenError) as caught:
        with_new(known, a=1)
    assert "already knows the trigger word <a>" in str(caught.value)
    assert "Choose another token" in str(caught.value)


def test_tokens_of_another_encoder_are_not_taken(encoder: ClipTextEncoder) -> None:
    same = encoder.with_tokens({"clip_g": {"<a>": rows(1)}})
    assert same.tokenize("<a>") == encoder.tokenize("<a>")


# What is borrowed


def test_gradients_reach_the_new_rows_only(encoder: ClipTextEncoder, model: CLIPTextModel) -> None:
    used, unused = rows(2).requires_grad_(True), rows(1).requires_grad_(True)
    known = encoder.with_tokens({"clip_l": {"<a>": used, "<b>": unused}})
    features = known.encode(known.pad([known.tokenize("photo of a <a> cat")]))
    features.square().sum().backward()
    assert used.grad is not None
    assert used.grad.any(-1).all()
    assert unused.grad is None or not unused.grad.any()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_of_rows_equal_those_of_a_model_whose_vocabulary_has_them(
    encoder: ClipTextEncoder, model: CLIPTextModel
) -> None:
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(VOCABULARY_SIZE + 1, mean_resizing=False)
    table = larger.get_input_embeddings().weight
    with torch.no_grad():
        table[VOCABULARY_SIZE:] = rows(1)
    table.requires_grad_(True)
    row = rows(1).requires_grad_(True)
    known = encoder.with_tokens({"clip_l": {"<a>": row}})
    ids = known.pad([known.tokenize("a <a> cat and a <a> dog")])
    known.encode(ids)[:, 3:].square().mean().backward()
    larger(ids).last_hidden_state[:, 3:].square().mean().backward()
    assert row.grad is not None
    assert table.grad is not None
    torch.testing.assert_close(row.grad, table.grad[VOCABULARY_SIZE:], atol=1e-7, rtol=1e-4)


def test_the_model_is_the_same_after_encoding(
    encoder: ClipTextEncoder, model: CLIPTextModel
) -> None:
    vocabulary, weights = model.get_input_embeddings(), state(model)
    encode(with_new(encoder, a=2), "photo of a <a> cat")
    assert model.get_input_embeddings() is vocabulary
    assert same_state(weights, model)


def test_the_model_is_the_same_after_encoding_failed(
    encoder: ClipTextEncoder, model: CLIPTextModel
) -> None:
    vocabulary, weights = model.get_input_embeddings(), state(model)
    too_long = torch.full((1, 78), END)
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        with_new(encoder, a=2).encode(too_long)
    assert model.get_input_embeddings() is vocabulary
    assert same_state(weights, model)


# Products in half precision


def test_products_in_bfloat16_are_nearer_to_float32_than_a_model_that_was_cast(
    model: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    def features_and_gradient(own: CLIPTextModel, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        encoder = ClipTextEncoder("clip_l", own, tokenizer, pad_id=END)
        encoder.to(torch.device("cpu"), dtype)
        row = rows(1).requires_grad_(True)
        known = encoder.with_tokens({"clip_l": {"<a>": row}})
        features = known.encode(known.pad([known.tokenize("photo of a <a> cat")]))
        (features * rows(77, seed=1)).sum().backward()
        assert row.grad is not None
        return features.detach(), row.grad

    exact = features_and_gradient(copy.deepcopy(model), torch.float32)
    ours = features_and_gradient(copy.deepcopy(model), torch.bfloat16)
    cast = copy.deepcopy(model).to(torch.bfloat16)
    theirs = features_and_gradient(cast, torch.bfloat16)
    for right, own, other in zip(exact, ours, theirs, strict=True):
        assert own.dtype == torch.float32
        assert 0 < (own - right).norm() < 0.01 * right.norm()
        assert (own - right).norm() < 0.8 * (other - right).norm()


def test_only_the_weights_of_products_lose_precision(
    model: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    own = copy.deepcopy(model)
    encoder = ClipTextEncoder("clip_l", own, tokenizer, pad_id=END)
    encoder.to(torch.device("cpu"), torch.bfloat16)
    encoder.to(torch.device("cpu"))  # as a job that has to wait: what was cast stays so
    for path, weight in own.named_parameters():
        before = model.get_parameter(path)
        product = ".mlp." in path or ".self_attn." in path
        assert weight.dtype == (torch.bfloat16 if product else torch.float32)
        assert torch.equal(weight, before.to(weight.dtype))
    assert torch.equal(
        encoder.vocabulary_row(7)["clip_l"][0], model.get_input_embeddings().weight[7]
    )


# Fingerprints


def test_equal_encoders_have_equal_fingerprints(
    encoder: ClipTextEncoder, model: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    twin = ClipTextEncoder("clip_l", copy.deepcopy(model), tokenizer, pad_id=END)
    assert twin.fingerprint() == encoder.fingerprint()
    assert with_new(twin, a=2).fingerprint() == with_new(encoder, a=2).fingerprint()


def test_a_fingerprint_does_not_depend_on_who_encoded_before(encoder: ClipTextEncoder) -> None:
    before = encoder.fingerprint()
    encode(with_new(encoder, a=1), "<a>")
    assert encoder.fingerprint() == before


def test_fingerprints_tell_settings_apart(model: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
    prints = {
        ClipTextEncoder(name, model, tokenizer, pad_id=pad, hidden_layer=layer).fingerprint()
        for name, pad, layer in [
            ("clip_l", END, None), ("clip_l", 0, None), ("clip_l", END, -2), ("clip_h", END, None),
        ]
    }  # fmt: skip
    assert len(prints) == 4


def test_fingerprints_tell_a_single_changed_weight(
    encoder: ClipTextEncoder, model: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        text_transformer(other).encoder.layers[1].mlp.fc2.weight[0, 0] += 1e-3
    changed = ClipTextEncoder("clip_l", other, tokenizer, pad_id=END)
    assert changed.fingerprint() != encoder.fingerprint()


def test_fingerprints_tell_tokens_apart(encoder: ClipTextEncoder) -> None:
    row, other = rows(1), rows(1, seed=9)
    variants: list[dict[str, Tensor]] = [
        {},
        {"<a>": row},
        {"<a>": other},
        {"<a>": torch.cat([row, other])},
        {"<a>": row, "<b>": other},
        {"<b>": row, "<a>": other},
        {"<b>": row},
    ]
    encoders = [encoder.with_tokens({"clip_l": variant}) for variant in variants]
    features = {encode(known, "<a> <b> cat").numpy().tobytes() for known in encoders}
    prints = {known.fingerprint() for known in encoders}
    assert len(features) == len(variants)
    assert len(prints) == len(variants)


# Where a new word starts


def test_a_piece_that_ends_a_word_is_another_than_the_same_letters_within_one(
    encoder: ClipTextEncoder,
) -> None:
    assert encoder.piece_id("cat</w>") == 2368
    assert encoder.piece_id("cat") == 1481
    assert with_new(encoder, a=2).piece_id("cat</w>") == 2368


def test_vocabulary_rows_are_copies(encoder: ClipTextEncoder, model: CLIPTextModel) -> None:
    row = encoder.vocabulary_row(2368)["clip_l"]
    wanted = model.get_input_embeddings().weight[2368].clone()
    assert row.shape == (1, CONTEXT_WIDTH)
    assert torch.equal(row[0], wanted)
    row += 1
    assert torch.equal(model.get_input_embeddings().weight[2368], wanted)


def test_tokens_without_initializer_start_at_rare_words_in_turn(
    encoder: ClipTextEncoder, tokenizer: CLIPTokenizer, model: CLIPTextModel
) -> None:
    assert [encoder.piece_id(piece) for piece in RARE_PIECES] == [42170, 47629, 43514]
    table = model.get_input_embeddings().weight
    for number, piece in enumerate(RARE_PIECES, 1):
        start = initial_embedding(encoder, "  ", f"<new{number}>")
        assert start.keys() == {"clip_l"}
        assert torch.equal(start["clip_l"][0], table[encoder.piece_id(piece)])


def test_no_two_names_start_alike(encoder: ClipTextEncoder, model: CLIPTextModel) -> None:
    names = [f"<{word}{n}>" for word in ("new", "cat", "dog", "my-") for n in range(1, 60)]
    rows = torch.cat([initial_embedding(encoder, "", name)["clip_l"] for name in names])
    distances = torch.cdist(rows, rows) / rows.norm(dim=1)
    distances.fill_diagonal_(1)
    assert distances.min() > 0.1
    rare = model.get_input_embeddings().weight[[encoder.piece_id(p) for p in RARE_PIECES]]
    near = (torch.cdist(rows, rare) / rows.norm(dim=1, keepdim=True)).min(1).values
    assert near.max() < 0.3
    again = initial_embedding(encoder, "", "<cat1>")["clip_l"]
    assert torch.equal(again[0], rows[names.index("<cat1>")])


def test_words_of_one_training_start_apart_whatever_they_start_from(
    encoder: ClipTextEncoder,
) -> None:
    """As the words of two DreamBooth concepts stay: alike they could never be told apart."""
    concepts = [cat_concept(initializer="dog"), dog_concept(initializer="dog")]
    start = Concept(FAMILIES["sd15"], {})
    words = words_to_teach(concepts, start, encoder, torch.device("cpu"))["clip_l"]
    assert not torch.equal(words["<new1>"], words["<new2>"])
    (first,) = initial_embedding(encoder, "dog").values()
    assert torch.equal(words["<new1>"], first)


def test_names_of_one_checksum_start_apart(encoder: ClipTextEncoder) -> None:
    """Their CRC-32 is the same, whatever stands around them."""
    names = "<plumless>", "<buckeroo>"
    assert len({zlib.crc32(name.encode()) for name in names}) == 1
    one, other = (initial_embedding(encoder, "", name)["clip_l"] for name in names)
    assert (one - other).norm() > 0.1 * one.norm()


def test_a_word_starts_apart_from_one_that_was_rounded(encoder: ClipTextEncoder) -> None:
    """A concept file holds half precision."""
    rows = initial_embedding(encoder, "dog")
    rounded = {name: row.half().float() for name, row in rows.items()}
    assert not torch.equal(rounded["clip_l"], rows["clip_l"])
    start = Concept(FAMILIES["sd15"], {}, (ModifierToken("<new1>", "cat", rounded),))
    learnt = words_to_teach([dog_concept(initializer="dog")], start, encoder, torch.device("cpu"))
    word = learnt["clip_l"]["<new2>"]
    assert (word - rows["clip_l"]).norm() > 0.1 * word.norm()


@pytest.mark.parametrize("word", ["cat", " Cat ", "CAT"])
def test_an_initializer_is_the_whole_word(
    encoder: ClipTextEncoder, model: CLIPTextModel, word: str
) -> None:
    """`cat</w>` is 2368; 1481 is `cat` within a word, as in 'catastrophe'."""
    start = initial_embedding(encoder, word)["clip_l"]
    assert torch.equal(start[0], model.get_input_embeddings().weight[2368])


@pytest.mark.parametrize("word, pieces", [("ktn", 2), ("tortoise plushy", 3), ("xqzzvk", None)])
def test_an_initializer_of_several_pieces_is_refused(
    encoder: ClipTextEncoder, word: str, pieces: int | None
) -> None:
    with pytest.raises(TokenError) as caught:
        initial_embedding(encoder, word)
    message = str(caught.value)
    assert f"The initializer {word!r} is {pieces or ''}" in message
    assert "one whole word is needed" in message
    assert "Use a common word" in message
