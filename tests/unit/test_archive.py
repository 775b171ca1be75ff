"""PyTorch archives: read as torch.load reads them, and refused in no time where they are forged."""

from __future__ import annotations

import collections
import copyreg
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from custom_diffusion.concept.errors import ConceptFileError
from custom_diffusion.formats.archive import read_archive
from custom_diffusion.formats.content import read_content
from custom_diffusion.formats.importing import open_concept
from support.pickles import (
    long,
    name,
    number,
    pickled,
    sizes,
    storage,
    tensor,
    text,
    write_archive,
)
from torch import Tensor, nn

FLOAT8 = [getattr(torch, n) for n in dir(torch) if n in ("float8_e4m3fn", "float8_e5m2")]
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, *FLOAT8),
]


def same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if theirs.numel():
            assert ours.stride() == theirs.stride()
        view = (torch.uint8,) if theirs.dtype in FLOAT8 else (theirs.dtype,)
        assert torch.equal(ours.contiguous().view(*view), theirs.detach().contiguous().view(*view))
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            same(ours[key], value)
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            same(our, their)
    else:
        assert ours == theirs and type(ours) is type(theirs)


def saved() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 8, generator=draw)
    return {
        **{str(dtype): {"a": (matrix * 9).to(dtype)} for dtype in DTYPES},
        "strides": {"t": matrix.T, "every": matrix[::2, 1::3], "row": matrix[3], "last": matrix[5]},
        "shared": {"a": matrix, "b": matrix[:, 2:], "c": matrix.view(48), "d": matrix[1, 1]},
        "expanded": {"a": torch.ones(1, 8).expand(6, 8), "b": matrix},
        "empty": {"a": torch.empty(0), "b": torch.empty(3, 0, 2), "c": torch.tensor(2.5)},
        "ordered": collections.OrderedDict([("b", matrix), ("a", matrix + 1)]),
        "state of a module": nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).state_dict(),
        "nested": {"a": {"b": [{"c": (1, 2.5, None, True, "x")}, matrix]}, "d": (), "e": []},
        "parameters": {"a": nn.Parameter(matrix), "b": nn.Parameter(matrix.T, False)},
        "numbers": {"a": 1, "b": -1, "c": 255, "d": 65536, "e": 1 << 40, "f": -(1 << 62), 5: 1},
        "sizes": {"a": matrix.shape, "text": "Mütze 帽子", "again": ["x", "x", matrix, matrix]},
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("case", saved())
def test_what_torch_reads_is_read_alike(case: str, protocol: int, tmp_path: Path) -> None:
    value = saved()[case]
    torch.save(value, tmp_path / "a.pt", pickle_protocol=protocol)
    theirs = (
        torch.load(tmp_path / "a.pt", weights_only=True)
        if protocol == 2
        else value  # its restricted reader knows no other protocol
    )
    with open(tmp_path / "a.pt", "rb") as file:
        same(read_archive(file, (tmp_path / "a.pt").stat().st_size), theirs)


def test_the_words_of_the_original_textual_inversion(tmp_path: Path) -> None:
    """It saves a ParameterDict, which torch.load(weights_only=True) refuses."""
    rows = torch.randn(2, 768)
    words = nn.ParameterDict({"*": nn.Parameter(rows)})
    torch.save({"string_to_token": {"*": 265}, "string_to_param": words}, tmp_path / "toy.pt")
    (token,) = open_concept(tmp_path / "toy.pt").concept.tokens
    assert torch.equal(token.embeddings["clip_l"], rows)


def refusal(path: Path) -> str:
    with pytest.raises(ConceptFileError) as caught:
        open_concept(path)
    return str(caught.value)


class _Object:
    pass


@pytest.mark.parametrize(
    ("value", "holds"),
    [
        (numpy.float64(1), "numpy"),
        (numpy.ones(2), "numpy"),
        (_Object(), "_Object"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (torch.ones(2, 2).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.empty(2, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (collections.Counter("a"), "collections.Counter"),
        (complex(1, 2), "complex"),
        (copyreg.__newobj__, "copy_reg.__newobj__"),
    ],
)
def test_what_is_no_tensor_is_refused_by_name(value: Any, holds: str, tmp_path: Path) -> None:
    torch.save({"a": value}, tmp_path / "a.pt")
    assert holds in refusal(tmp_path / "a.pt")


def dag(levels: int) -> bytes:
    """A tuple of a tuple twice, and so on: to hash, compare or show it takes 2^levels steps."""
    start = b")q\x00"
    return start + b"".join(b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(levels))


FORGED = {
    "a key of nested tuples": (b"\x80\x02}" + dag(200) + b"K\x01s.", "names something by a tuple"),
    "a value of nested tuples": (pickled(dag(200)), "nothing that can be made one"),
    "a shape of nested tuples": (pickled(tensor(shape=dag(200))), "shape|dimensions"),
    "a set of nested tuples": (
        pickled(name("__builtin__", "set") + b"]" + dag(200) + b"a\x85R"),
        "nothing that can be made one",
    ),
    "a device of nested tuples": (
        pickled(name("torch", "device") + dag(200) + b"\x85R"),
        "nothing that can be made one",
    ),
    "a storage's key of nested tuples": (
        pickled(b"(" + text("storage") + name("torch", "FloatStorage") + dag(200) + b"NNtQ"),
        "storage",
    ),
    "a list that holds itself": (pickled(b"]q\x01h\x01a"), "nothing that can be made one"),
    "a mapping that holds itself": (
        b"\x80\x02}q\x00" + text("unet") + b"h\x00s" + text("modifier_token") + b"h\x00s.",
        "no concept|no embedding|no cross-attention",
    ),
    "many brackets": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "holds a list"),
    "many instructions": (b"\x80\x02" + b"N0" * (1 << 20) + b".", "too large|torch.save"),
    "a large list again and again": (
        b"\x80\x02(" + b"N" * 300_000 + b"tq\x000"
        + (name("torch", "Size") + b"h\x00\x85R") * 20_000 + b".",
        "torch.save|takes what|nothing",
    ),
    "a large mapping again and again": (
        b"\x80\x02}q\x00(" + b"".join(number(n) + b"N" for n in range(100_000)) + b"u}q\x01"
        + text("_parameters") + b"h\x00s"
        + (name("torch.nn.modules.container", "ParameterDict") + b")\x81h\x01b") * 20_000 + b".",
        "too large",
    ),
    "whole numbers that collide": (
        b"\x80\x02}(" + b"".join(
            long(n * ((1 << 61) - 1)) + b"N" for n in range(9, 50_000)
        ) + b"u.",
        "64 bits",
    ),
    "a number of megabytes": (pickled(long(1 << (8 << 23))), "LONG4|too large"),
    "a text of megabytes": (pickled(text("x" * (1 << 23))), "characters"),
    "half a character": (pickled(text("\ud800")), "surrogates"),
    "a decimal number": (pickled(b"I" + b"9" * 3000 + b"\n"), "uses INT"),
    "a text beyond the end": (b"\x80\x02X" + struct.pack("<I", 1 << 31) + b"a", "damaged|expected"),
    "no end": (b"\x80\x02}", "pickle exhausted|no end"),
    "no stack": (b"\x80\x02a.", "takes what was not there"),
    "nothing in the memo": (b"\x80\x02h\x05.", "does not hold"),
    "a mark": (b"\x80\x02(.", "takes what was not there"),
    "an unknown instruction": (b"\x80\x02\xff.", "opcode"),
    "an extension": (b"\x80\x02\x82\x01.", "EXT1"),
    "a persistent text": (b"\x80\x02Pabc\n.", "PERSID"),
    "os.system": (pickled(name("os", "system") + text("true") + b"\x85R"), "os.system"),
    "getattr": (pickled(name("builtins", "getattr")), "builtins.getattr"),
    "torch.load": (pickled(name("torch", "load") + b")R"), "torch.load"),
    "a name that is a text": (pickled(text("torch._utils._rebuild_tensor_v2") + b")R"), "damaged"),
    "a type that is called": (pickled(name("torch", "float16") + b")R"), "makes"),
    "a storage that is called": (pickled(name("torch", "FloatStorage") + b")R"), "makes"),
    "a tensor of nothing": (
        pickled(name("torch._utils", "_rebuild_tensor_v2") + b")R"),
        "of something else",
    ),
    "no storage": (pickled(tensor(source=storage("9"))), "missing"),
    "a path for a storage": (pickled(tensor(source=storage("../data.pkl"))), "missing"),
    "a storage of more": (pickled(tensor(source=storage(numbers=5))), "cut short"),
    "a negative storage": (pickled(tensor(source=storage(numbers=-1))), "cut short"),
    "a larger tensor": (pickled(tensor(sizes(5))), "larger than its storage"),
    "an offset": (pickled(tensor(offset=1)), "larger than its storage"),
    "a negative offset": (pickled(tensor(offset=-1)), "shape is none"),
    "a negative size": (pickled(tensor(sizes(-4))), "shape is none"),
    "a negative stride": (pickled(tensor(strides=sizes(-1))), "shape is none"),
    "a stride": (pickled(tensor(strides=sizes(2))), "larger than its storage"),
    "a stride of 2^62": (pickled(tensor(strides=sizes(1 << 62))), "larger than its storage"),
    "a size of 2^62": (pickled(tensor(sizes(1 << 62), sizes(0))), "more than the whole file"),
    "more sizes than strides": (pickled(tensor(sizes(2, 2))), "dimensions"),
    "a size that is true": (pickled(tensor(b"(\x88t")), "shape is none"),
    "a thousand dimensions": (pickled(tensor(sizes(*[1] * 1000))), "dimensions"),
    "nothing of a large shape": (
        pickled(tensor(sizes(0, 1 << 40, 1 << 40), sizes(0, 0, 0))),
        "more than the whole file",
    ),
    "one storage in many tensors": (
        b"\x80\x02}(" + b"".join(
            text(f"<n{n}>") + tensor(sizes(1000), sizes(0)) for n in range(3000)
        ) + b"u.",
        "together are more",
    ),
    "a few tensors of one number": (
        b"\x80\x02}(" + b"".join(
            text(f"<n{n}>") + tensor(sizes(1000), sizes(0)) for n in range(9)
        ) + b"u.",
        "more than",
    ),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", FORGED)
def test_a_forged_structure_is_refused_in_no_time(case: str, tmp_path: Path) -> None:
    content, message = FORGED[case]
    path = write_archive(tmp_path / "forged.pt", content, {"0": bytes(16)})
    before = time.monotonic()
    with pytest.raises(ConceptFileError, match=rf"(?s)forged\.pt.*({message})"):
        open_concept(path)
    assert time.monotonic() - before < 15


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.slow
def test_forged_structures_take_little_memory(tmp_path: Path) -> None:
    """All of them in one process: no more than the pack itself and a few times the largest."""
    for place, (content, _) in enumerate(FORGED.values()):
        write_archive(tmp_path / f"{place}.pt", content, {"0": bytes(16)})
    tests = Path(__file__).resolve().parents[1]
    code = f"""
import resource, sys
sys.path.insert(0, {str(tests)!r})
import conftest
from pathlib import Path
from custom_diffusion.concept.errors import ConceptFileError
from custom_diffusion.formats.importing import open_concept
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in Path(".").glob("*.pt"):
    try:
        open_concept(path)
    except ConceptFileError:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert int(run.stdout) < 300_000, run.stderr  # kB


def rewrite(path: Path, change: Any) -> None:
    """Writes the entries of an archive again, as `change` of each says: a list of (name, bytes)."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for entry in entries:
            for filename, content in change(*entry):
                archive.writestr(filename, content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, c: [(n, c)] * (1 + n.endswith("data/0")), "twice"),
        (lambda n, c: [(n, c)] * (1 + n.endswith("data.pkl")), "twice"),
        (lambda n, c: [] if n.endswith("data/0") else [(n, c)], "missing"),
        (lambda n, c: [(n, c[:-1] if n.endswith("data/0") else c)], "cut short"),
        (lambda n, c: [(n, b"big" if n.endswith("byteorder") else c)], "byte order"),
        (lambda n, c: [] if n.endswith("data.pkl") else [(n, c)], "not one that PyTorch wrote"),
        (lambda n, c: [(n, c), (f"other/{n}", c)], "not one that PyTorch wrote"),
        (lambda n, c: [(n, bytes(17 << 20) if n.endswith("data.pkl") else c)], "too large"),
        (
            lambda n, c: (
                [(n, c), *((f"{'x' * 60000}{k}", b"") for k in range(200))]
                if n.endswith("data.pkl")
                else [(n, c)]
            ),
            "directory is too large",
        ),
    ],
)
def test_a_zip_that_is_forged(change: Any, message: str, tmp_path: Path) -> None:
    torch.save({"<a>": torch.ones(768)}, tmp_path / "a.pt")
    rewrite(tmp_path / "a.pt", change)
    assert message in refusal(tmp_path / "a.pt")


def test_entries_that_share_bytes(tmp_path: Path) -> None:
    """As in zip bombs: a directory that points at one place twice."""
    torch.save({"<a>": torch.ones(768), "<b>": torch.ones(768)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        first, second = (archive.getinfo(f"a/data/{number}").header_offset for number in (0, 1))
    content = (tmp_path / "a.pt").read_bytes()
    places = [struct.pack("<I", place) + b"a/data/1" for place in (second, first)]
    (tmp_path / "a.pt").write_bytes(content.replace(*places))
    assert "share bytes" in refusal(tmp_path / "a.pt")


def test_any_flipped_byte_is_read_or_refused(tmp_path: Path) -> None:
    torch.save({"<a>": torch.ones(8), "b": {"c": [1, 2.5]}}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    for position in range(0, len(content), 3):
        changed = bytearray(content)
        changed[position] ^= 0x55
        (tmp_path / "b.pt").write_bytes(changed)
        try:
            read_content(tmp_path / "b.pt")
        except ConceptFileError as error:
            assert "b.pt" in str(error)
