"""Pictures out of a large collection: read from every layout, indexed once, searched exactly."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from custom_diffusion.concept.errors import DataError
from custom_diffusion.pictures.opening import PictureError
from custom_diffusion.trainer.data.folders import load_folder
from custom_diffusion.trainer.regularization import caption_index as index_module
from custom_diffusion.trainer.regularization.caption_index import CaptionIndex
from custom_diffusion.trainer.regularization.collection import Entry, Part, parts_of
from custom_diffusion.trainer.regularization.retrieved import retrieve
from PIL import Image
from support.children import run_python
from torch import Tensor

WORDS = ("cat", "dog", "mug", "sitting", "on", "a", "red", "sofa", "photo", "of", "snow", "the")


def png(shade: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def write_pictures(folder: Path, captions: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, caption in enumerate(captions):
        (folder / f"{number}.png").write_bytes(png(number))
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")


def write_shard(path: Path, files: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))


class BagOfWords:
    """Embeds a caption as the words it has; remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, captions: Sequence[str]) -> Tensor:
        self.asked += captions
        counts = torch.tensor([[float(c.split().count(w)) for w in WORDS] for c in captions])
        return torch.nn.functional.normalize(counts + 1e-3, dim=-1)


def captions_of(collection: Path) -> list[str]:
    return [entry.caption for part in parts_of(collection) for entry in part.entries()]


# Layouts


def test_pictures_with_texts_are_read_from_every_folder(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a", ["a cat", " a\n dog "])
    write_pictures(tmp_path / "b" / "c", ["a mug"])
    (tmp_path / "a" / "without.png").write_bytes(png())
    assert captions_of(tmp_path) == ["a cat", "a dog", "a mug"]
    first = parts_of(tmp_path)[0]
    assert first.read(Entry("", "1.png")) == png(1)


def test_shards_are_read_sample_by_sample(tmp_path: Path) -> None:
    samples = [
        ("x/001.jpg", png(1)),
        ("x/001.txt", b"a cat"),
        ("x/002.json", json.dumps({"caption": "a dog", "url": "?"}).encode()),
        ("x/002.png", png(2)),
        ("x/003.txt", b"no picture"),
        ("x/004.jpg", png(4)),
        ("x/005.jpg", png(5)),
        ("x/005.txt", b"a mug"),
    ]
    write_shard(tmp_path / "00000.tar", samples)
    (tmp_path / "00000.parquet").write_bytes(b"only what the shard says too")
    (part,) = parts_of(tmp_path)
    entries = list(part.entries())
    assert [(entry.caption, entry.location) for entry in entries] == [
        ("a cat", "x/001.jpg"),
        ("a dog", "x/002.png"),
        ("a mug", "x/005.jpg"),
    ]
    assert [part.read(entry) for entry in entries] == [png(1), png(2), png(5)]


@pytest.mark.parametrize("by_key", [True, False])
def test_tables_are_read_with_the_pictures_they_name(tmp_path: Path, by_key: bool) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    write_pictures(tmp_path / "00000", ["", ""])
    (tmp_path / "00000" / "0.png").rename(tmp_path / "00000" / "007.png")
    places = {"key": ["007", "gone"]} if by_key else {"path": ["00000/007.png", None]}
    table = arrow.table({"caption": ["a cat", "a dog"], **places})
    parquet.write_table(table, tmp_path / "00000.parquet")
    (part,) = parts_of(tmp_path)
    assert list(part.entries()) == [Entry("a cat", "00000/007.png")]
    assert part.read(Entry("", "00000/007.png")) == png(0)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no collection"):
        parts_of(tmp_path)
    (tmp_path / "bad.tar").write_bytes(b"not a shard at all")
    with pytest.raises(DataError, match=r"bad\.tar cannot be read"):
        captions_of(tmp_path)
    write_shard(tmp_path / "bad.tar", [("1.png", png()), ("1.json", b"{broken")])
    with pytest.raises(DataError, match=r"bad\.tar cannot be read"):
        captions_of(tmp_path)
    with pytest.raises(DataError, match=r"2\.png of .*Was the collection changed"):
        Part(tmp_path / "bad.tar").read(Entry("", "2.png", start=512, size=10**6))


def test_tables_of_addresses_or_of_nothing_are_refused(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "t.parquet"
    parquet.write_table(arrow.table({"caption": ["a cat"], "url": ["http://x"]}), file)
    with pytest.raises(DataError, match="must be downloaded first"):
        captions_of(tmp_path)
    parquet.write_table(arrow.table({"caption": ["a cat"], "key": ["1"]}), file)
    with pytest.raises(DataError, match="neither t.tar nor a folder t"):
        captions_of(tmp_path)
    file.write_bytes(b"PAR1 broken")
    with pytest.raises(DataError, match="cannot be read"):
        captions_of(tmp_path)


# The index


def random_captions(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(count)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "CHUNK", 7)


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """Fifty captions in three parts."""
    captions = random_captions(50)
    folder = tmp_path / "collection"
    write_pictures(folder / "a", captions[:20])
    samples = [(f"{i}.{e}", c) for i, t in enumerate(captions[20:40]) for e, c in sample(i, t)]
    write_shard(folder / "b.tar", samples)
    write_pictures(folder / "c", captions[40:])
    return folder


def sample(number: int, caption: str) -> list[tuple[str, bytes]]:
    return [("png", png(number)), ("txt", caption.encode())]


def test_search_finds_what_brute_force_finds(
    collection: Path, tmp_path: Path, small_chunks: None
) -> None:
    embed = BagOfWords()
    index = CaptionIndex(collection, tmp_path / "indexes", "words")
    assert index.update(embed) == 50
    captions = captions_of(collection)
    assert sorted(embed.asked) == sorted(captions)
    (query,) = BagOfWords()(["photo of a cat"])
    similarity = BagOfWords()(captions) @ query
    for count, least in ((5, -1.0), (50, 0.5), (3, 0.7)):
        wanted = sorted((float(s) for s in similarity if s >= least), reverse=True)[:count]
        found = index.search(query, count, least)
        assert [f.similarity for f in found] == pytest.approx(wanted, abs=2e-3)
        for one in found:
            own = BagOfWords()([one.entry.caption])[0] @ query
            assert one.similarity == pytest.approx(float(own), abs=2e-3)
            assert one.part.read(one.entry).startswith(b"\x89PNG")
    with pytest.raises(DataError, match=r"as near as 1\.1.*nearest has"):
        index.search(query, 5, 1.1)


def test_an_index_is_made_once_goes_on_where_it_stopped_and_follows_the_collection(
    collection: Path, tmp_path: Path, small_chunks: None
) -> None:
    class Stop(Exception):
        pass

    class Stopping(BagOfWords):
        def __call__(self, captions: Sequence[str]) -> Tensor:
            if len(self.asked) >= 28:
                raise Stop
            return super().__call__(captions)

    stopping, rest = Stopping(), BagOfWords()
    with pytest.raises(Stop):
        CaptionIndex(collection, tmp_path / "i", "words").update(stopping)
    assert CaptionIndex(collection, tmp_path / "i", "words").update(rest) == 50
    assert sorted(stopping.asked + rest.asked) == sorted(captions_of(collection))

    again = BagOfWords()
    assert CaptionIndex(collection, tmp_path / "i", "words").update(again) == 50
    assert again.asked == []
    write_pictures(collection / "d", ["a cat on snow"])
    shutil.rmtree(collection / "c")
    index = CaptionIndex(collection, tmp_path / "i", "words")
    assert index.update(again) == 41
    assert again.asked == ["a cat on snow"]
    (query,) = again(["a cat on snow"])
    (best,) = index.search(query, 1, 0.9)
    assert best.entry.caption == "a cat on snow"
    other = BagOfWords()
    CaptionIndex(collection, tmp_path / "i", "another encoder").update(other)
    assert len(other.asked) == 41


def test_a_damaged_index_is_named(collection: Path, tmp_path: Path) -> None:
    index = CaptionIndex(collection, tmp_path / "i", "words")
    index.update(BagOfWords())
    file = next((tmp_path / "i").rglob("*.npy"))
    file.write_bytes(file.read_bytes()[:20])
    (query,) = BagOfWords()(["a cat"])
    with pytest.raises(DataError, match="is damaged.*Delete its folder"):
        index.search(query, 5, 0.0)


def test_an_index_that_lost_a_chunk_is_not_searched_as_if_it_were_whole(
    collection: Path, tmp_path: Path, small_chunks: None
) -> None:
    index = CaptionIndex(collection, tmp_path / "i", "words")
    index.update(BagOfWords())
    next((tmp_path / "i").rglob("*-00002.npy")).unlink()
    (query,) = BagOfWords()(["a cat"])
    with pytest.raises(DataError, match="has lost .* captions of"):
        index.search(query, 5, 0.0)


def test_a_collection_without_captions_is_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path / "c", [" ", ""])
    with pytest.raises(DataError, match="No picture of .* has a caption"):
        CaptionIndex(tmp_path / "c", tmp_path / "i", "words").update(BagOfWords())


# The whole way


def test_the_nearest_pictures_become_a_regularization_set(collection: Path, tmp_path: Path) -> None:
    write_pictures(collection / "d", ["photo of a cat", "photo of a cat sitting", "the snow"])
    (collection / "d" / "1.png").write_bytes(b"broken")
    index = CaptionIndex(collection, tmp_path / "i", "words")
    index.update(BagOfWords())
    folder = tmp_path / "set"
    got = retrieve(index, BagOfWords(), "photo of a cat", folder, count=3, least=0.6)
    assert got.images[0].caption == "photo of a cat"
    assert "photo of a cat sitting" not in [image.caption for image in got.images]
    assert got.broken == 1 and 0.6 <= got.least_similarity < 1
    assert load_folder(folder, "") == got.images
    with pytest.raises(DataError, match="other settings"):
        retrieve(index, BagOfWords(), "photo of a dog", folder, count=3, least=0.6)
    for picture in (collection / "d").glob("*.png"):
        picture.write_bytes(b"broken")
    with pytest.raises(DataError, match="has changed since"):
        retrieve(index, BagOfWords(), "photo of a cat", tmp_path / "new", count=3, least=0.99)
    index.update(BagOfWords())
    with pytest.raises(DataError, match="none of their pictures can be opened"):
        retrieve(index, BagOfWords(), "photo of a cat", tmp_path / "new", count=3, least=0.99)


# What strangers may have put into a collection

SECRET = png(250)


def hostile_member(name: str, **changes: Any) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    for field, value in changes.items():
        setattr(member, field, value)
    return member


def shard_of(path: Path, *members: tuple[tarfile.TarInfo | bytes, bytes]) -> Path:
    """A shard as the members say it is, whether or not it is true."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for member, content in members:
            header = member if isinstance(member, bytes) else member.tobuf(tarfile.PAX_FORMAT)
            file.write(header)
            file.write(content + bytes(-len(content) % 512))
        file.write(bytes(1024))
    return path


def good_sample(name: str, shade: int = 1) -> list[tuple[tarfile.TarInfo, bytes]]:
    caption, content = b"a cat", png(shade)
    return [
        (hostile_member(f"{name}.txt", size=len(caption)), caption),
        (hostile_member(f"{name}.png", size=len(content)), content),
    ]


def test_names_in_a_shard_are_no_paths(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(SECRET)
    names = [f"{tmp_path}/secret", "../secret", "C:\\secret", "\\\\host\\share\\s"]
    members = [part for n, name in enumerate(names) for part in good_sample(name, n)]
    shard_of(tmp_path / "c" / "a.tar", *members)
    (part,) = parts_of(tmp_path / "c")
    entries = list(part.entries())
    assert len(entries) == len(names)
    assert [part.read(entry) for entry in entries] == [png(n) for n in range(len(names))]


def test_a_shard_takes_no_links_devices_or_files_with_holes(tmp_path: Path) -> None:
    caption = (hostile_member("x.txt", size=5), b"a cat")
    holes = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 50)}
    kinds: list[dict[str, Any]] = [
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"type": tarfile.LNKTYPE, "linkname": "x.txt"},
        {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
        {"type": tarfile.FIFOTYPE},
        {"type": tarfile.DIRTYPE},
        {"type": tarfile.GNUTYPE_SPARSE},
        {"pax_headers": {**holes, "GNU.sparse.name": "x.png"}, "size": 512},
    ]
    for number, kind in enumerate(kinds):
        content = b"1\n0\n1\n".ljust(512, b"\0") if "size" in kind else b""
        members = [caption, (hostile_member("x.png", **kind), content)]
        shard_of(tmp_path / f"{number}" / "a.tar", *members, *good_sample("y"))
        (part,) = parts_of(tmp_path / f"{number}")
        assert [entry.location for entry in part.entries()] == ["y.png"]
    itself = hostile_member("x.txt", type=tarfile.SYMTYPE, linkname="x.txt")
    shard_of(tmp_path / "link" / "a.tar", (itself, b""), *good_sample("y"))
    assert captions_of(tmp_path / "link") == ["a cat"]


def pax(records: bytes, size: int | None = None) -> tuple[tarfile.TarInfo, bytes]:
    size = len(records) if size is None else size
    return hostile_member("pax", type=tarfile.XHDTYPE, size=size), records


def gnu_name(size: int) -> tuple[tarfile.TarInfo, bytes]:
    return hostile_member("name", type=tarfile.GNUTYPE_LONGNAME, size=size), b""


def negative_size() -> tuple[bytes, bytes]:
    """By which tarfile goes back to the same member for ever."""
    member = hostile_member("x.png")
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-512 & (1 << 96) - 1).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header), b""


HOSTILE_SHARDS: dict[str, Callable[[], list[tuple[tarfile.TarInfo | bytes, bytes]]]] = {
    "a picture longer than the shard": lambda: [(hostile_member("x.png", size=1 << 40), b"")],
    "a caption longer than the shard": lambda: [(hostile_member("x.txt", size=1 << 40), b"a cat")],
    "a header of gigabytes": lambda: [pax(b"", 4 << 30)],
    "a negative header": lambda: [pax(b"20 size=-1000000000\n"), *good_sample("x")],
    "a name of gigabytes": lambda: [gnu_name(8 << 30)],
    "a negative size": lambda: [negative_size()],
    "headers of headers": lambda: [pax(b"10 a=bcde\n") for _ in range(5000)],
    "a number of many digits": lambda: [pax(b"6013 size=%s\n" % (b"9" * 6002)), *good_sample("x")],
    "deep brackets": lambda: [(hostile_member("x.json", size=400_000), b"[" * 400_000)],
    "a .json of megabytes": lambda: [(hostile_member("x.json", size=2 << 20), bytes(2 << 20))],
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", HOSTILE_SHARDS)
def test_a_shard_that_lies_is_named(name: str, tmp_path: Path) -> None:
    shard_of(tmp_path / "bad.tar", *good_sample("a"), *HOSTILE_SHARDS[name](), *good_sample("z"))
    with pytest.raises(DataError, match=r"bad\.tar cannot be read"):
        captions_of(tmp_path)


@pytest.mark.timeout(20)
def test_parts_that_are_no_files_are_named(tmp_path: Path) -> None:
    for name, make in (
        ("a.tar", lambda path: path.symlink_to("/dev/zero")),
        ("b.tar", os.mkfifo),
        ("c.parquet", os.mkfifo),
    ):
        (tmp_path / name).mkdir()
        make(tmp_path / name / name)
        with pytest.raises(DataError, match="cannot be read .*not a file"):
            captions_of(tmp_path / name)
    write_pictures(tmp_path / "d", ["a cat", "a dog"])
    (tmp_path / "d" / "1.txt").unlink()
    os.mkfifo(tmp_path / "d" / "1.txt")
    with pytest.raises(DataError, match=r"1\.txt cannot be read .it is a pipe"):
        captions_of(tmp_path / "d")


def test_captions_are_read_as_far_as_a_search_looks(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a cat"])
    with open(tmp_path / "0.txt", "ab") as file:
        file.truncate(4 << 30)
    (caption,) = captions_of(tmp_path)
    assert caption.startswith("a cat") and len(caption) <= 64_000


def write_table(path: Path, captions: Sequence[str], places: Sequence[str]) -> Part:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table({"caption": captions, "path": places}), path)
    return Part(path)


@pytest.mark.timeout(20)
def test_rows_of_a_table_lead_to_nothing_outside(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(SECRET)
    folder = tmp_path / "c"
    write_pictures(folder, ["a cat"])
    (folder / "secret.txt").write_bytes(b"not to be copied")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "device.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    with open(folder / "large.png", "wb") as file:
        file.truncate(4 << 30)
    outside = [
        *(f"{tmp_path}/secret.png", "../secret.png", "..\\secret.png", "0.png/../../secret.png"),
        *("C:\\secret.png", "C:secret.png", "\\\\host\\share\\secret.png", "//host/secret.png"),
        *("link.png", "up/secret.png", "device.png", "pipe.png", "folder.png", "large.png"),
        *("secret.txt", "secret.txt\0.png", "", ".png", "a" * 5000 + ".png"),
    ]
    part = write_table(folder / "t.parquet", ["a cat"] * (len(outside) + 1), [*outside, "0.png"])
    entries = list(part.entries())
    assert len(entries) == len(outside)  # all but the empty one, and the good one
    read = []
    for entry in entries:
        try:
            read.append(part.read(entry))
        except PictureError as error:
            assert str(folder / "t.parquet") in str(error)
    assert read == [png(0)]


def test_pictures_that_are_not_used_are_counted(tmp_path: Path) -> None:
    """And nothing from outside lies in the set."""
    (tmp_path / "secret.png").write_bytes(SECRET)
    folder = tmp_path / "c"
    write_pictures(folder / "images", ["a dog"])
    places = ["../secret.png", f"{tmp_path}/secret.png", "images/0.png"]
    write_table(folder / "t.parquet", ["photo of a cat"] * 3, places)
    (folder / "images" / "0.txt").unlink()
    index = CaptionIndex(folder, tmp_path / "i", "words")
    index.update(BagOfWords())
    got = retrieve(index, BagOfWords(), "photo of a cat", tmp_path / "set", count=3, least=0.6)
    assert (len(got.images), got.broken) == (1, 2)
    assert [file.read_bytes() for file in (tmp_path / "set").glob("*.png")] == [png(0)]
    (folder / "images" / "0.png").unlink()
    write_table(folder / "t.parquet", ["photo of a cat"] * 2, places[:2])
    index = CaptionIndex(folder, tmp_path / "i", "words")
    index.update(BagOfWords())
    with pytest.raises(DataError, match="The first: .*secret.png .*it lies outside the collection"):
        retrieve(index, BagOfWords(), "photo of a cat", tmp_path / "set2", count=3, least=0.6)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory")
@pytest.mark.slow
def test_a_table_that_unpacks_without_end_is_named(tmp_path: Path) -> None:
    """One long text for thousands of rows takes no place in the file."""
    pytest.importorskip("pyarrow")
    (tmp_path / "c").mkdir()
    code = f"""
from pathlib import Path
import pyarrow, pyarrow.parquet
from custom_diffusion.concept.errors import DataError
from custom_diffusion.trainer.regularization.collection import Part
file = Path({str(tmp_path / "c" / "t.parquet")!r})
texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100_000), ["x" * 10_000_000])
table = pyarrow.table({{"caption": texts, "path": ["a.png"] * 100_000}})
pyarrow.parquet.write_table(table, file, compression="zstd", store_schema=False)
before = peak_mb()
try:
    list(Part(file).entries())
except DataError as error:
    print(peak_mb() - before, error)
"""
    megabytes, _, message = run_python(code).partition(" ")
    assert "t.parquet cannot be read (a text has 10000000 bytes" in message
    assert float(megabytes) < 100


def test_odd_columns_are_named(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for column in ([["a cat"]], [1], [{"a": "b"}], [b"\xff"]):
        parquet.write_table(
            arrow.table({"caption": column, "path": ["a.png"]}), tmp_path / "t.parquet"
        )
        with pytest.raises(DataError, match=r"t\.parquet cannot be read"):
            captions_of(tmp_path)
    text = arrow.array(["a cat"], arrow.large_string())
    parquet.write_table(arrow.table({"caption": text, "path": ["a.png"]}), tmp_path / "t.parquet")
    assert captions_of(tmp_path) == ["a cat"]


def test_halves_of_characters_are_no_trouble(tmp_path: Path) -> None:
    caption = rb'{"caption": "a cat \ud800"}'
    write_shard(tmp_path / "c" / "a.tar", [("x\udcff.json", caption), ("x\udcff.png", png())])
    index = CaptionIndex(tmp_path / "c", tmp_path / "i", "words")
    index.update(BagOfWords())
    got = retrieve(index, BagOfWords(), "a cat", tmp_path / "set", count=1, least=0.5)
    assert load_folder(tmp_path / "set", "") == got.images


@pytest.mark.parametrize(
    "line",
    [
        '{"caption": "a", "location": "0.png", "start": -5, "size": 3}',
        '{"caption": "a", "location": 7}',
        '{"caption": "a", "location": "0.png", "size": "all"}',
        '{"caption": "a", "location": "0.png", "command": "rm"}',
        "[" * 100_000,
        "7",
        "",
    ],
)
def test_an_index_that_somebody_wrote_leads_nowhere(line: str, tmp_path: Path) -> None:
    write_pictures(tmp_path / "c", ["a cat"])
    index = CaptionIndex(tmp_path / "c", tmp_path / "i", "words")
    index.update(BagOfWords())
    (lines,) = (tmp_path / "i").rglob("*.jsonl")
    lines.write_text(line)
    (query,) = BagOfWords()(["a cat"])
    with pytest.raises(DataError, match="is damaged.*Delete its folder"):
        index.search(query, 5, 0.0)
