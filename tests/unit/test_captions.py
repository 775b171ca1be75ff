"""Regularization captions: our own are many, different and repeatable; the user's are checked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from custom_diffusion.concept.errors import DataError
from custom_diffusion.concept.text import encode_unpadded
from custom_diffusion.host.clip.text_encoder import ClipTextEncoder, text_transformer
from custom_diffusion.merge.captions import (
    DEFAULT_COUNT,
    MINIMUM_COUNT,
    read_captions,
    regularization_captions,
)
from custom_diffusion.merge.projector import caption_factor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def _captions(count: int = MINIMUM_COUNT) -> list[str]:
    return [f"a photo of {number} cats" for number in range(count)]


def test_there_are_1200_different_captions() -> None:
    captions = regularization_captions()
    assert len(captions) == DEFAULT_COUNT == 1200
    assert len({caption.lower() for caption in captions}) == 1200


def test_captions_depend_on_nothing_but_count_and_seed() -> None:
    assert regularization_captions(100, seed=3) == regularization_captions(100, seed=3)
    assert regularization_captions(50, seed=3) == regularization_captions(100, seed=3)[:50]
    assert regularization_captions(100, seed=3) != regularization_captions(100, seed=4)


def test_captions_hold_no_modifier_token_and_no_line_break() -> None:
    captions = regularization_captions()
    assert not [c for c in captions if set("<>\n\r") & set(c) or c != " ".join(c.split())]


@pytest.fixture(scope="module")
def caption_features(tokenizer: CLIPTokenizer) -> torch.Tensor:
    """CLIP-L's width, vocabulary and tokenizer; random weights, two layers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=12,
        max_position_embeddings=77,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPTextModel(config).eval().requires_grad_(False)
        # A fresh final norm centres every feature and so takes one dimension; no trained one does.
        norm = text_transformer(model).final_layer_norm
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(std=0.5)
    encoder = ClipTextEncoder("clip_l", model, tokenizer, pad_id=49407)
    token_ids = [encoder.tokenize(caption) for caption in regularization_captions()]
    assert max(map(len, token_ids)) < 77, "no caption is cut off"
    return torch.cat([features[1:] for features in encode_unpadded(encoder, token_ids)])


def test_our_captions_span_every_dimension_of_the_text_features(
    caption_features: torch.Tensor,
) -> None:
    assert len(caption_features) > 5 * 768
    singular = torch.linalg.svdvals(caption_features.double())
    assert len(singular) == 768
    assert float(singular[-1] / singular[0]) > 1e-5, "far above the rounding of float32"


def test_our_captions_need_no_ridge(caption_features: torch.Tensor) -> None:
    upper = caption_factor(caption_features, DEFAULT_COUNT, relative_ridge=0.0).upper
    gram = caption_features.double().T @ caption_features.double()
    torch.testing.assert_close(upper.T @ upper, gram, rtol=1e-9, atol=1e-9 * float(gram.max()))


def test_a_users_file_is_read_line_by_line(tmp_path: Path) -> None:
    captions = [*_captions(), "ein Foto von einem Mützchen", "猫の写真"]
    path = tmp_path / "captions.txt"
    path.write_text("\n\n".join(f"  {c}\t" for c in captions) + "\n", encoding="utf-8")
    assert read_captions(path) == captions
    assert read_captions(str(path)) == captions


def test_windows_line_ends_are_no_part_of_a_caption(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes("\r\n".join(_captions()).encode())
    assert read_captions(path) == _captions()


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(_captions()).encode())
    assert read_captions(path) == _captions()


def test_too_few_captions_are_refused_with_how_many_are_needed(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(_captions(MINIMUM_COUNT - 1)), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_captions(path)
    message = str(caught.value)
    assert "captions.txt" in message
    assert f"holds {MINIMUM_COUNT - 1} captions" in message
    assert f"at least {MINIMUM_COUNT}" in message
    assert "Add more lines" in message


def test_an_empty_caption_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes(b"\n \n")
    with pytest.raises(DataError, match="holds 0 captions"):
        read_captions(path)


def test_a_missing_caption_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_captions(tmp_path / "nothing.txt")
    assert "nothing.txt" in str(caught.value)
    assert "one caption a line" in str(caught.value)


@pytest.mark.timeout(20)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in this system's folders")
def test_a_caption_file_that_is_none_or_without_end_is_named(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"captions\.txt cannot be read \(it is a pipe, not a file"):
        read_captions(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"captions\.txt cannot be read \(it is a device, not a"):
        read_captions(path)
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(4 << 30)
    with pytest.raises(DataError, match=r"captions\.txt cannot be read \(it is larger than 16 MB"):
        read_captions(path)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_caption_file_in_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("\n".join([*_captions(), "Mützchen"]), encoding=encoding)
    with pytest.raises(DataError) as caught:
        read_captions(path)
    assert "captions.txt is not a UTF-8 text file" in str(caught.value)
    assert "Save it as UTF-8" in str(caught.value)
