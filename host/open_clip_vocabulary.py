"""CLIP's own tokenizer where no pretrained model is at hand: open_clip ships the vocabulary.

A checkpoint in one file holds no vocabulary, and tests and benchmarks draw their weights at random;
their prompts should still be split into the word pieces of the real model.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT_LENGTH = 77


def clip_tokenizer() -> Any:
    """A `transformers.CLIPTokenizer` with the vocabulary and the padding of SD 1.x."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    ours = SimpleTokenizer()
    *pieces, _, _ = (
        ours.encoder
    )  # bytes, bytes that end a word, merges; then open_clip's start, end
    vocabulary = {piece: index for index, piece in enumerate([*pieces, START, END])}
    merges = [" ".join(pair) for pair in ours.bpe_ranks]
    with (
        tempfile.TemporaryDirectory() as name
    ):  # files are what every release of transformers reads
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *merges, ""]
        (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(
            name,
            local_files_only=True,
            bos_token=START,
            eos_token=END,
            unk_token=END,
            pad_token=END,
            model_max_length=CONTEXT_LENGTH,
        )
