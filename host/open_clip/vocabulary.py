"""CLIP's own tokenizer where no pretrained model is at hand: open_clip ships the vocabulary.

A checkpoint in one file holds no vocabulary, and tests and benchmarks draw their weights at random;
their prompts should still be split into the word pieces of the real model.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT_LENGTH = 77


def clip_tokenizer() -> Any:
    """A `transformers.CLIPTokenizer` with the vocabulary and the padding of SD 1.x."""
    from open_clip.tokenizer import SimpleTokenizer

    ours = SimpleTokenizer()
    *pieces, _, _ = (
        ours.encoder
    )  # bytes, bytes that end a word, merges; then open_clip's start, end
    merges = list(ours.bpe_ranks)
    with tempfile.TemporaryDirectory() as name:
        write_vocabulary(Path(name), [*pieces, START, END], merges)
        return read_tokenizer(Path(name), CONTEXT_LENGTH)


def write_vocabulary(
    folder: Path, pieces: Sequence[str], merges: Iterable[tuple[str, str]]
) -> None:
    """Writes vocab.json and merges.txt: files are what every release of transformers reads."""
    indices = {piece: index for index, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(indices), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def read_tokenizer(folder: Path, context_length: int) -> Any:
    """A `transformers.CLIPTokenizer` of such a folder, with the padding of SD 1.x."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(
        str(folder),
        local_files_only=True,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=context_length,
    )


def clip_pieces(words: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The pieces and merges of CLIP's vocabulary that split these words as the whole does.

    Every byte is among the pieces, so any text can be written with them.
    """
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    merges: set[tuple[str, str]] = set()
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while pairs := set(zip(pieces, pieces[1:], strict=False)) & tokenizer.bpe_ranks.keys():
            first, second = best = min(pairs, key=tokenizer.bpe_ranks.__getitem__)
            merges.add(best)
            joined: list[str] = []
            for piece in pieces:
                if joined and (joined[-1], piece) == best:
                    joined[-1] = first + second
                else:
                    joined.append(piece)
            pieces = joined
    ordered = sorted(merges, key=tokenizer.bpe_ranks.__getitem__)
    letters = list(tokenizer.byte_encoder.values())
    ends = [f"{letter}</w>" for letter in letters]
    return [*letters, *ends, *("".join(pair) for pair in ordered)], ordered
