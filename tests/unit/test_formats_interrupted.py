"""Exports that are killed or interrupted while they write: what is there afterwards is complete."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from custom_diffusion.cli import main
from custom_diffusion.concept.concept import Concept
from custom_diffusion.formats.base import BaseModel
from custom_diffusion.formats.content import ENDINGS
from custom_diffusion.formats.exporting import FORMATS, bake, export_concept
from custom_diffusion.formats.importing import open_concept
from safetensors.torch import save_file
from support.made_concepts import made_concept

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the process is forked"),
    pytest.mark.slow,
    pytest.mark.any_version,
]

SHAPES = {
    f"input_blocks.7.1.transformer_blocks.0.attn2.to_{matrix}": (1280, 768) for matrix in "kv"
}
WRITTEN = (0.0, 0.5, 1.0)
"""Shares of the first file that are there when the signal comes; at 1 it has no name yet, or just
got it
"""
MOST_TRIES = 30
"""A process on a busy machine can be at its end before the signal is sent"""
LONGEST_S = 20


@pytest.fixture(scope="module")
def concept() -> Concept:
    """Of megabytes also as factors."""
    return made_concept(SHAPES, rank=256, scale=1e-4)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    draw = torch.Generator().manual_seed(1)
    return BaseModel({k: torch.randn(s, generator=draw) for k, s in SHAPES.items()})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
@pytest.mark.parametrize("kind", [*FORMATS, "checkpoint"])
def test_an_export_that_is_ended_leaves_whole_files_or_none(
    kind: str,
    number: signal.Signals,
    concept: Concept,
    base: BaseModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if kind == "embeddings":  # of megabytes, too
        word = replace(concept.tokens[0], embeddings={"clip_l": torch.ones(2000, 768)})
        concept = replace(concept, tokens=(word,))
    if kind == "checkpoint":
        checkpoint = {f"model.diffusion_model.{k}.weight": w for k, w in base.weights.items()}
        save_file(checkpoint, tmp_path / "base.safetensors")

    def write(folder: Path) -> None:
        if kind == "checkpoint":
            bake(concept, tmp_path / "base.safetensors", folder / "cat.safetensors")
        else:
            export_concept(concept, folder / "cat", kind, base)

    whole = tmp_path / "whole"
    write(whole)
    files = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    largest = max((whole / file).stat().st_size for file in files)
    ended = 0
    for attempt in range(MOST_TRIES):
        if attempt >= len(WRITTEN) and ended:
            break
        folder = tmp_path / str(attempt)
        ended += end_in_write(write, folder, WRITTEN[attempt % len(WRITTEN)] * largest, number)
        found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        left_over = found - files
        assert all(path.name.startswith(".") for path in left_over)
        assert not any(path.suffix in ENDINGS for path in left_over)
        assert len(left_over) <= (number == signal.SIGKILL)
        for file in found & files:
            assert same(folder / file, whole / file, base)
        main(["list", str(folder)])
        listed = capsys.readouterr().out
        assert not any(path.name in listed for path in left_over)
    assert ended
    for file in found & files:
        (folder / file).unlink()
    write(folder)  # what was left over is in nobody's way
    assert all(same(folder / file, whole / file, base) for file in files)


def end_in_write(
    write: Callable[[Path], None], folder: Path, written: float, number: signal.Signals
) -> bool:
    """Sends the signal to a process that writes, once so many bytes are there; whether it came
    before the end.
    """
    folder.mkdir()
    child = os.fork()
    if not child:
        # Tests that run in the background of a script have been started deaf to Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            write(folder)
        except KeyboardInterrupt:
            os._exit(1)
        os._exit(0)
    until = time.monotonic() + LONGEST_S
    while time.monotonic() < until and largest_file(folder) < written:
        pass
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    assert time.monotonic() < until
    return os.waitstatus_to_exitcode(status) != 0


def largest_file(folder: Path) -> int:
    """In bytes; -1 where there is none."""
    sizes = [-1]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size if path.is_file() else -1)
        except FileNotFoundError:  # it got its name just now
            continue
    return max(sizes)


def same(path: Path, other: Path, base: BaseModel) -> bool:
    """Whether two files hold the same tensors; archives also hold the name they were written by."""
    if path.suffix == ".safetensors":
        return path.read_bytes() == other.read_bytes()
    ours, theirs = (open_concept(p, base).concept for p in (path, other))
    return ours.layers == theirs.layers and all(
        torch.equal(ours.deltas[k].dense(), theirs.deltas[k].dense()) for k in ours.layers
    )
