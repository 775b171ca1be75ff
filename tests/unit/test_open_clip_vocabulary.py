"""A part of CLIP's vocabulary against the whole."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from custom_diffusion.host.open_clip.vocabulary import END, START, clip_pieces
from transformers import CLIPTokenizer

WORDS = ["cat", "tortoise", "mississippi", "xqzzvk", "hottentotten", "aaaaaa", "a", ",", "7"]


def tokenizer_of(words: Iterable[str], folder: Path) -> CLIPTokenizer:
    pieces, merges = clip_pieces(words)
    vocabulary = {piece: index for index, piece in enumerate([*pieces, START, END])}
    assert len(vocabulary) == len(pieces) + 2, "a piece comes twice"
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(
        str(folder), local_files_only=True, bos_token=START, eos_token=END, unk_token=END
    )


def pieces_of(tokenizer: CLIPTokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])[1:-1]


@pytest.mark.parametrize("words", [WORDS, *([word] for word in WORDS)], ids=str)
def test_the_words_are_split_as_with_the_whole_vocabulary(
    words: list[str], tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    part = tokenizer_of(words, tmp_path)
    for text in (*words, " ".join(words)):
        assert pieces_of(part, text) == pieces_of(tokenizer, text)


def test_any_other_text_can_be_written_and_read_back(tmp_path: Path) -> None:
    part = tokenizer_of(["cat"], tmp_path)
    pieces = pieces_of(part, "zebra käse ミ")
    assert pieces[:5] == ["z", "e", "b", "r", "a</w>"]
    assert END not in pieces
    assert part.decode(part("zebra käse ミ")["input_ids"][1:-1]).strip() == "zebra käse ミ"


def test_only_what_the_words_need_is_there() -> None:
    pieces, merges = clip_pieces(["cat"])
    assert [first + second for first, second in merges] == pieces[512:]
    assert pieces[-1] == "cat</w>"
    assert len(merges) == 2
