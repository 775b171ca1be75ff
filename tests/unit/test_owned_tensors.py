"""Tensors that were read are nobody else's: what becomes of the file afterwards changes nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import ConceptFileError, UnreadableFileError
from custom_diffusion.concept.file import read_concept, write_concept
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.concept.tensors import read_header, read_tensors
from custom_diffusion.formats.base import BaseModel, read_base
from custom_diffusion.formats.exporting import bake, export_concept
from custom_diffusion.formats.importing import open_concept
from custom_diffusion.merge.caption_cache import cached_caption_factor
from safetensors.torch import load_file, save_file
from support.concepts import random_concept
from support.made_concepts import made_concept
from support.text import RecurrentTextEncoder
from torch import Tensor

KEY = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"


def base() -> BaseModel:
    return BaseModel({KEY: torch.randn(640, 768, generator=torch.Generator().manual_seed(5))})


def write_base(path: Path) -> None:
    save_file({f"model.diffusion_model.{k}.weight": w for k, w in base().weights.items()}, path)


def export(kind: str, name: str) -> Callable[[Path], object]:
    concept = made_concept({KEY: (640, 768)})
    return lambda path: export_concept(concept, path.with_name(name), kind, base())


def of_concept(concept: Concept) -> Iterator[Tensor]:
    for delta in concept.deltas.values():
        yield from (tensor for tensor in delta.tensors().values() if tensor.ndim)
    for token in concept.tokens:
        yield from token.embeddings.values()


READERS: dict[str, tuple[str, Callable[[Path], object], Callable[[Path], list[Tensor]]]] = {
    "a concept": (
        "a.safetensors",
        lambda path: write_concept(random_concept(family=FAMILIES["sd15"]), path),
        lambda path: [*of_concept(read_concept(path))],
    ),
    "a concept that is opened": (
        "a.safetensors",
        lambda path: write_concept(random_concept(family=FAMILIES["sd15"]), path),
        lambda path: [*of_concept(open_concept(path).concept)],
    ),
    "a LoRA": (
        "a.safetensors",
        export("kohya-lora", "a"),
        lambda path: [*of_concept(open_concept(path).concept)],
    ),
    "an embedding": (
        "a.safetensors",
        export("embeddings", "a"),
        lambda path: [*of_concept(open_concept(path).concept)],
    ),
    "an archive": (
        "a.pt",
        lambda path: torch.save({"<cat>": torch.randn(768)}, path),
        lambda path: [*of_concept(open_concept(path).concept)],
    ),
    "a delta of whole weights": (
        "a.bin",
        export("adobe", "a"),
        lambda path: [*of_concept(open_concept(path, base()).concept)],
    ),
    "a base": ("a.safetensors", write_base, lambda path: [*read_base(path).weights.values()]),
    "any .safetensors": (
        "a.safetensors",
        write_base,
        lambda path: [*read_tensors(path)[0].values()],
    ),
}


@pytest.mark.parametrize("accident", ["cut short", "overwritten", "deleted"])
@pytest.mark.parametrize("kind", READERS)
def test_the_file_can_go(kind: str, accident: str, tmp_path: Path) -> None:
    name, write, read = READERS[kind]
    path = tmp_path / name
    write(path)
    tensors = read(path)
    assert tensors
    assert_not_mapped(path)
    before = [tensor.clone() for tensor in tensors]
    if accident == "overwritten":
        with open(path, "r+b") as file:
            file.write(b"\xa5" * path.stat().st_size)
    elif accident == "cut short":
        os.truncate(path, 0)
    else:
        path.unlink()
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))


def assert_not_mapped(path: Path) -> None:
    """Nor open: Windows does not delete files that are."""
    if sys.platform == "linux":
        assert str(path) not in Path("/proc/self/maps").read_text()
        links = (Path("/proc/self/fd") / number for number in os.listdir("/proc/self/fd"))
        assert str(path) not in {os.readlink(link) for link in links if link.is_symlink()}


def test_the_captions_factor(tmp_path: Path) -> None:
    encoder = RecurrentTextEncoder()
    captions = ["a cat", "a dog on a mat", "two mugs"]
    cached_caption_factor(encoder, captions, 1e-3, tmp_path)
    factor = cached_caption_factor(encoder, captions, 1e-3, tmp_path)
    (path,) = tmp_path.iterdir()
    assert_not_mapped(path)
    before = factor.upper.clone()
    os.truncate(path, 0)
    assert torch.equal(factor.upper, before)


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path: Path) -> None:
    """An error; of a mapped file it would be the end of the process."""
    path = tmp_path / "a.safetensors"
    write_base(path)

    def cut(name: str) -> bool:
        os.truncate(path, 1000)
        return True

    with pytest.raises(UnreadableFileError, match="end is missing"):
        read_tensors(path, cut)


def test_only_what_is_chosen_is_read(tmp_path: Path) -> None:
    """Of a sparse checkpoint of 40 GB, more than any machine of ours has memory."""
    path = tmp_path / "large.safetensors"
    tensors = {"a": 4, "large": 40 << 30, "z": 4}
    entries, end = {}, 0
    for name, size in tensors.items():
        places = [end, end + size]
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": places}
        end += size

    header = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + b"abcd")
        file.seek(8 + len(header) + end - 4)
        file.write(b"wxyz")
    chosen, _ = read_tensors(path, lambda name: name != "large")
    assert {name: bytes(t.tolist()) for name, t in chosen.items()} == {"a": b"abcd", "z": b"wxyz"}
    with pytest.raises(ConceptFileError, match="nothing that can be made one"):
        open_concept(path)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int64),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8, torch.int16),
    ],
    ids=str,
)
def test_what_safetensors_reads_is_read_alike(dtype: torch.dtype, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"m": (5, 7), "0": (), "e": (0, 3), "c": (2, 3, 1, 1)}
    tensors = {n: (torch.randn(s, generator=draw) * 9).to(dtype) for n, s in shapes.items()}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {"größe": "帽子\n\t"})
    ours, metadata = read_tensors(path)
    theirs = load_file(path)
    assert ours.keys() == theirs.keys() and metadata == {"größe": "帽子\n\t"}
    for name, tensor in theirs.items():
        assert ours[name].dtype == dtype and ours[name].shape == tensor.shape
        assert torch.equal(ours[name].float(), tensor.float())


def test_a_concept_in_eight_bits_can_be_computed_with(tmp_path: Path) -> None:
    concept = random_concept(family=FAMILIES["sd15"])
    write_concept(concept, tmp_path / "a.safetensors", torch.float8_e4m3fn)
    for read in (read_concept, lambda path: open_concept(path).concept):
        for layer, delta in read(tmp_path / "a.safetensors").deltas.items():
            exact = concept.deltas[layer].dense()
            torch.testing.assert_close(delta.dense().float(), exact, rtol=0.07, atol=2e-3)


def test_a_baked_checkpoint_keeps_every_other_byte(tmp_path: Path) -> None:
    names = {"first": torch.ones(3, dtype=torch.int64), "last": torch.ones(5).bfloat16()}
    weights = {f"model.diffusion_model.{k}.weight": w.half() for k, w in base().weights.items()}
    before: dict[str, Any] = {**names, **weights}
    save_file(before, tmp_path / "a.safetensors", {"author": "somebody"})
    concept = made_concept({KEY: (640, 768)})
    bake(concept, tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    one, other = ((tmp_path / f"{n}.safetensors").read_bytes() for n in "ab")
    place = read_header(tmp_path / "a.safetensors").tensors[next(iter(weights))]
    assert len(one) == len(other)
    assert one[: place.start] == other[: place.start]
    assert one[place.start + place.size :] == other[place.start + place.size :]
    baked = load_file(tmp_path / "b.safetensors")[next(iter(weights))]
    expected = weights[next(iter(weights))].float() + concept.deltas[KEY].dense()
    assert torch.equal(baked, expected.half())
