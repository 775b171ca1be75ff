"""Files that nobody should have to open: headers, archives and things that are no file, each with
what must become of it in a list: a part of the reason for which it is refused, or a card.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

KEY = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k"
CARD = ""
"""In place of a reason: the file is listed"""
LARGE = 1 << 20


@dataclass(frozen=True)
class Hostile:
    """A file, by name, and a pattern of the reason; `CARD` where it may be listed as a card."""

    name: str
    reason: str
    write: Callable[[Path], object]


def raw(header: bytes | str, body: bytes = b"", length: int | None = None) -> bytes:
    """A .safetensors of any header."""
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> str:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


def concept(**metadata: str) -> bytes:
    """A good concept file, but for the metadata given."""
    return concept_with({}, **metadata)


def concept_with(tensors: Mapping[str, Tensor], **metadata: str) -> bytes:
    known = {
        "format": "custom-diffusion-concept",
        "format_version": "1.0",
        "base_family": "sd15",
        "tokens": json.dumps([{"name": "<new1>", "class_noun": "cat"}]),
        "provenance": json.dumps({"method": "low-rank", "steps": 250}),
    }
    rows = {"bundle_emb.<new1>.string_to_param.*": torch.ones(1, 768)}
    return save({**rows, **tensors}, {**known, **metadata})


def lora(parts: Mapping[str, tuple[int, ...]], **metadata: str) -> bytes:
    tensors = {f"{KEY}.{part}": torch.ones(shape) for part, shape in parts.items()}
    return save(tensors, metadata or None)


HEADERS: dict[str, tuple[str, bytes]] = {
    "empty": ("truncated", b""),
    "one byte": ("truncated", b"{"),
    "length alone": ("truncated", struct.pack("<Q", 8)),
    "length of all": ("truncated", raw("{}", length=(1 << 64) - 1)),
    "length of 2^63": ("truncated", raw("{}", length=1 << 63)),
    "no brace": ("not a .safetensors", raw("[]")),
    "list": ("not a .safetensors", raw("[1, 2, 3]")),
    "not JSON": ("header is damaged", raw("{a")),
    "not UTF-8": ("header is damaged", raw(b'{"\xff\xfe": 1}')),
    "duplicate": ("twice", raw('{"a": 1, "a": 2}')),
    "duplicate metadata": ("twice", raw('{"__metadata__": {"a": "1", "a": "2"}}')),
    "surrogate in a name": ("header is damaged", raw('{"__metadata__": {"\\ud800": "a"}}')),
    "surrogate in a value": ("header is damaged", raw('{"__metadata__": {"a": "\\udfff"}}')),
    "surrogate bytes": ("header is damaged", raw(b'{"__metadata__": {"a": "\xed\xa0\x80"}}')),
    "deep lists": ("too deep", raw('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")),
    "deep objects": ("too deep", raw('{"a": ' * 100_000 + "1" + "}" * 100_000)),
    "metadata list": ("metadata are not texts", raw('{"__metadata__": [1]}')),
    "metadata numbers": ("metadata are not texts", raw('{"__metadata__": {"a": 1}}')),
    "metadata nested": ("metadata are not texts", raw('{"__metadata__": {"a": {"b": "c"}}}')),
    "large header": ("MB are the most", raw('{"__metadata__": {"a": "' + "x" * (9 << 20) + '"}}')),
    "many tensors": (
        "are the most",
        raw(
            "{"
            + ",".join(
                f'"{n}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for n in range(40_000)
            )
            + "}"
        ),
    ),
    "long name": ("characters", raw(json.dumps({"x" * LARGE: json.loads(entry())["a"]}), bytes(4))),
    "entry number": ("is no tensor", raw('{"a": 1}')),
    "entry without dtype": ("is no tensor", raw('{"a": {"shape": [], "data_offsets": [0, 0]}}')),
    "entry with more": (
        "is no tensor",
        raw('{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4], "b": 1}}', bytes(4)),
    ),
    "dtype number": ("no type", raw(entry(dtype=3), bytes(4))),
    "dtype list": ("no type", raw(entry(dtype=["F32"]), bytes(4))),
    "shape number": ("no type, shape", raw(entry(shape=4), bytes(4))),
    "shape text": ("no type, shape", raw(entry(shape="4"), bytes(4))),
    "shape true": ("no type, shape", raw(entry(shape=[True]), bytes(4))),
    "shape float": ("no type, shape", raw(entry(shape=[1.0]), bytes(4))),
    "shape NaN": ("no type, shape", raw(entry(shape=[float("nan")]), bytes(4))),
    "shape Infinity": ("no type, shape", raw(entry(shape=[float("inf")]), bytes(4))),
    "shape negative": ("no type, shape", raw(entry(shape=[-1]), bytes(4))),
    "shape 2^63": ("no type, shape", raw(entry(shape=[1 << 63]), bytes(4))),
    "shape 2^62": ("no tensor has", raw(entry(shape=[1 << 62, 4]), bytes(4))),
    "shape of nothing": ("no tensor has", raw(entry(shape=[0, 1 << 62], offsets=[0, 0]))),
    "shape overflow": ("no tensor has", raw(entry(shape=[1 << 32, 1 << 32]), bytes(4))),
    "shape 400 digits": ("no type, shape", raw(entry(shape=[10**399]), bytes(4))),
    "shape 5000 digits": ("header is damaged", raw(entry(shape=[0]).replace("[0]", "9" * 5000))),
    "rank million": ("no tensor has", raw(entry(shape=[1] * LARGE), bytes(4))),
    "shape of more": ("do not fill", raw(entry(shape=[2]), bytes(4))),
    "offsets number": ("no type, shape or place", raw(entry(offsets=4), bytes(4))),
    "offsets one": ("has no place", raw(entry(offsets=[4]), bytes(4))),
    "offsets three": ("has no place", raw(entry(offsets=[0, 4, 8]), bytes(4))),
    "offsets negative": ("no type, shape or place", raw(entry(offsets=[-4, 0]), bytes(4))),
    "offsets reversed": ("has no place", raw(entry(offsets=[4, 0]), bytes(4))),
    "offsets overflow": (
        "no type, shape or place",
        raw(entry(offsets=[1 << 64, (1 << 64) + 4]), bytes(4)),
    ),
    "offsets beyond": ("do not fill", raw(entry(offsets=[0, 1 << 40]), bytes(4))),
    "offsets with a hole": ("does not begin", raw(entry(offsets=[4, 8]), bytes(8))),
    "bytes of none": ("belong to none", raw(entry(), bytes(8))),
    "end missing": ("end is missing", raw(entry(), bytes(3))),
    "same bytes twice": (
        "does not begin",
        raw(
            json.dumps({name: json.loads(entry())["a"] for name in ("a", "b")}),
            bytes(4),
        ),
    ),
    "unknown dtype": (CARD, raw(entry(dtype="F4", offsets=[0, 1]), bytes(1))),
    "LFS": ("Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64),
    "web page": ("web page", b"<!DOCTYPE html>\n<html><body>Not found</body></html>"),
    "JSON error": ("JSON", b'{"error": "Repository not found", "status": 404}'),
    "pickle": ("pickle", pickle.dumps({"a": 1}, 2)),
    "zip": ("pickle", b"PK\x03\x04" + bytes(100)),
}


def words(**word: Any) -> str:
    return json.dumps([{"name": "<new1>", "class_noun": "cat", **word}])


CONCEPTS: dict[str, tuple[str, bytes]] = {
    "version 9": ("Update the pack", concept(format_version="9.0")),
    "version of megabytes": ("Update the pack", concept(format_version="9" * LARGE)),
    "family unknown": ("unknown model family", concept(base_family="sd9")),
    "family with escapes": ("unknown model family", concept(base_family="\x1b[2J" * 100)),
    "tokens not JSON": ("damaged", concept(tokens="[{")),
    "tokens number": ("not a list", concept(tokens="5")),
    "tokens text": ("not a list", concept(tokens='"<new1>"')),
    "tokens null": ("not a list", concept(tokens="null")),
    "tokens object": ("not a list", concept(tokens='{"name": "<new1>"}')),
    "tokens texts": ("not a list", concept(tokens='["<new1>"]')),
    "tokens deep": ("too deep", concept(tokens="[" * 100_000 + "]" * 100_000)),
    "tokens quite deep": ("too deep", concept(tokens="[" * 500 + "]" * 500)),
    "tokens many": (
        "are the most",
        concept(tokens=json.dumps([{"name": f"<n{n}>", "class_noun": ""} for n in range(5000)])),
    ),
    "tokens twice": ("twice", concept(tokens=json.dumps(json.loads(words()) * 2))),
    "name list": ("a text is needed", concept(tokens=words(name=["<new1>"]))),
    "name number": ("a text is needed", concept(tokens=words(name=1))),
    "name of megabytes": ("characters", concept(tokens=words(name=f"<{'a' * LARGE}>"))),
    "name with escapes": ("ordinary text", concept(tokens=words(name="<\x1b[2J>"))),
    "name surrogate": ("damaged", concept(tokens='[{"name": "<\\ud800>", "class_noun": ""}]')),
    "noun missing": ("a text is needed", concept(tokens='[{"name": "<new1>"}]')),
    "noun list": ("a text is needed", concept(tokens=words(class_noun=["cat"]))),
    "noun true": ("a text is needed", concept(tokens=words(class_noun=True))),
    "noun of megabytes": ("characters", concept(tokens=words(class_noun="cat" * LARGE))),
    "noun with escapes": (CARD, concept(tokens=words(class_noun="\x1b[31mcat\x07\u202e"))),
    "noun surrogate": ("damaged", concept(tokens=words(class_noun="cat\udc80"))),
    "initializer object": ("a text is needed", concept(tokens=words(initializer={}))),
    "provenance not JSON": ("damaged", concept(provenance="{")),
    "provenance list": ("not a JSON object", concept(provenance="[]")),
    "provenance NaN": (CARD, concept(provenance='{"steps": NaN, "loss": -Infinity}')),
    "provenance 1e999": (CARD, concept(provenance='{"steps": 1e999}')),
    "provenance deep": ("too deep", concept(provenance='{"a":' * 900 + "1" + "}" * 900)),
    "provenance surrogate": ("damaged", concept(provenance='{"a": ["\\ud83d"]}')),
    "provenance of megabytes": (CARD, concept(provenance=json.dumps({"a": "x" * LARGE}))),
    "steps list": ("steps", concept(provenance='{"steps": [1, [2]]}')),
    "steps nested": ("steps", concept(provenance='{"steps": {"a": {"b": 1}}}')),
    "steps text": ("steps", concept(provenance='{"steps": "250"}')),
    "steps true": ("steps", concept(provenance='{"steps": true}')),
    "steps negative": ("steps", concept(provenance='{"steps": -1}')),
    "steps float": ("steps", concept(provenance='{"steps": 2.5}')),
    "steps 400 digits": (CARD, concept(provenance=f'{{"steps": {"9" * 400}}}')),
    "steps 5000 digits": (CARD, concept(provenance=f'{{"steps": {"9" * 5000}}}')),
    "method list": ("a text is needed", concept(provenance='{"method": ["a"]}')),
    "method of megabytes": ("characters", concept(provenance=json.dumps({"method": "x" * LARGE}))),
    "created of megabytes": ("characters", concept(created="2" * LARGE)),
    "created with escapes": (CARD, concept(created="2026\x1b[2J")),
    "hash of megabytes": ("characters", concept(base_hash="0" * LARGE)),
    "prompts object": ("not a list", concept(constraint_prompts='{"a": 1}')),
    "prompts numbers": ("a text is needed", concept(constraint_prompts="[1]")),
    "prompt of megabytes": ("characters", concept(constraint_prompts=json.dumps(["x" * LARGE]))),
    "picture in it": (CARD, concept(**{"modelspec.thumbnail": "data:," + "A" * LARGE})),
}
OTHERS: dict[str, tuple[str, bytes]] = {
    "alpha 400 digits": (
        CARD,
        lora(
            {"lora_up.weight": (8, 2), "lora_down.weight": (2, 768)},
            lora_adapter_metadata=f'{{"unet.lora_alpha": {"9" * 400}}}',
        ),
    ),
    "settings deep": (
        CARD,
        lora(
            {"lora_up.weight": (8, 2), "lora_down.weight": (2, 768)},
            lora_adapter_metadata="[" * 100_000,
        ),
    ),
    "entries list": (CARD, save({"a": torch.ones(2)}, {"json": '{"entries": [[[]]]}'})),
    "entries deep": (CARD, save({"a": torch.ones(2)}, {"json": "[" * 100_000})),
    "lokr": (CARD, lora({"lokr_w1": (400, 400), "lokr_w2": (400, 400)})),
    "loha": (CARD, lora({f"hada_w{n}_{s}": (8, 8) for n in (1, 2) for s in "ab"})),
    "name with escapes": (CARD, save({"\x1b[2Ja": torch.ones(2)})),
}


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _unreadable_link(path: Path) -> None:
    path.symlink_to("nowhere.safetensors")


def _circle(path: Path) -> None:
    path.symlink_to(path.name)


def _odd_date(path: Path) -> None:
    path.write_bytes(raw(entry(), bytes(4)))
    os.utime(path, ns=(0, (1 << 62) + 5))


def no_files() -> Iterator[Hostile]:
    """What is called like a file of weights and is none, as far as the system has such things."""
    for ending in (".safetensors", ".bin"):
        yield Hostile(f"folder{ending}", "a folder", Path.mkdir)
        if hasattr(os, "mkfifo"):
            yield Hostile(f"pipe{ending}", "a pipe", _pipe)
    if os.name != "nt":
        yield Hostile("link.safetensors", "There is no concept file", _unreadable_link)
        yield Hostile("circle.safetensors", "cannot be opened", _circle)
        yield Hostile("device.safetensors", "a device", lambda path: path.symlink_to("/dev/zero"))
        yield Hostile("date.safetensors", CARD, _odd_date)
        yield Hostile("e\x1b[2J.safetensors", "Rename", lambda path: path.write_bytes(concept()))
        yield Hostile(
            os.fsdecode(b"not-\xff-text.safetensors"),
            "Rename",
            lambda path: path.write_bytes(concept()),
        )


def hostile_files() -> list[Hostile]:
    """All of them, by names that are different."""
    files = []
    for group in (HEADERS, CONCEPTS, OTHERS):
        for name, (reason, content) in group.items():
            number = len(files)
            write = lambda path, content=content: path.write_bytes(content)  # noqa: E731
            files.append(Hostile(f"{number:03}-{name.replace('/', '')}.safetensors", reason, write))
    return [*files, *no_files()]
