"""Pictures out of a large collection: read from every layout, indexed once, searched exactly."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from custom_diffusion.concept.errors import DataError
from custom_diffusion.trainer.data import load_folder
from custom_diffusion.trainer.retrieval import index as index_module
from custom_diffusion.trainer.retrieval.collection import Entry, Part, parts_of
from custom_diffusion.trainer.retrieval.index import CaptionIndex
from custom_diffusion.trainer.retrieval.retrieve import retrieve
from PIL import Image
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
