"""Hugging Face's weights have their words in files beside them, where anything may lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from custom_diffusion.concept.checks import MOST_WORDS
from custom_diffusion.formats.content import read_content
from custom_diffusion.formats.custom_diffusion import read_hugging_face
from safetensors.torch import save_file

KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "pytorch_custom_diffusion_weights.safetensors"
    save_file({KEY: torch.ones(320, 768)}, path)
    save_file({"<new1>": torch.ones(768)}, tmp_path / "new1.safetensors")
    return path


@pytest.mark.skipif(os.name == "nt", reason="links and pipes")
def test_what_is_no_file_is_passed_over(weights: Path) -> None:
    weights.with_name("nowhere.bin").symlink_to("gone")
    weights.with_name("circle.bin").symlink_to("circle.bin")
    weights.with_name("zeros.bin").symlink_to("/dev/zero")
    weights.with_name("folder.bin").mkdir()
    os.mkfifo(weights.with_name("pipe.bin"))
    found = read_hugging_face(read_content(weights))
    assert found and list(found.tokens) == ["<new1>"]


def test_so_many_words_are_none(weights: Path) -> None:
    for number in range(MOST_WORDS):
        weights.with_name(f"{number}.bin").touch()
    with pytest.raises(ValueError, match="may each be a word"):
        read_hugging_face(read_content(weights))
