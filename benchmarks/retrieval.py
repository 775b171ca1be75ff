"""A million captions: reading them, and finding those that are nearest to a prompt.

The collection is written as img2dataset writes one, with pictures of a few bytes. Its captions'
features are drawn, not computed: unit vectors of CLIP's width whose similarity to the prompt is
normal, so that about one in 700 reaches the default of 0.85. What computing them would take is
extrapolated from 128 captions through a random text model of the default's size.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import _pack  # noqa: F401  (puts the pack on the path)
import torch
from _measure import interleaved, options, peak_memory_gib, write_json
from custom_diffusion.host.open_clip.text import MODEL, OpenClipText
from custom_diffusion.merge.captions import regularization_captions
from custom_diffusion.trainer.regularization.caption_index import CaptionIndex
from custom_diffusion.trainer.regularization.collection import parts_of
from custom_diffusion.trainer.regularization.retrieved import COUNT, LEAST_SIMILARITY
from torch import Tensor

ROWS = 10_000
"""Captions of a part: img2dataset's default."""
FOLDERS = 10
"""Folders of separate files are a tenth of a collection of 100 parts: so many small files."""
WIDTH = 512
MEAN, DEVIATION = 0.55, 0.1
"""Of the similarities to the prompt."""
PICTURE = bytes(1000)
TIMED_CAPTIONS = 128


def captions() -> list[str]:
    texts = regularization_captions()
    return [f"{texts[row % len(texts)]} {row}" for row in range(ROWS)]


def write_tables(folder: Path, parts: int) -> None:
    import pyarrow
    import pyarrow.parquet

    places = [f"{row:09}.jpg" for row in range(ROWS)]
    table = pyarrow.table({"caption": captions(), "path": places})
    pyarrow.parquet.write_table(table, folder / "00000.parquet")
    _link(folder / "00000.parquet", parts)


def write_shards(folder: Path, parts: int) -> None:
    with tarfile.open(folder / "00000.tar", "w") as shard:
        for row, caption in enumerate(captions()):
            files = {"jpg": PICTURE, "txt": caption.encode(), "json": b'{"status": "success"}'}
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{row:09}.{extension}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    _link(folder / "00000.tar", parts)


def write_folders(folder: Path, parts: int) -> None:
    for part in range(parts):
        (folder / f"{part:05}").mkdir()
        for row, caption in enumerate(captions()):
            (folder / f"{part:05}" / f"{row:09}.jpg").touch()
            (folder / f"{part:05}" / f"{row:09}.txt").write_text(caption)


def _link(first: Path, parts: int) -> None:
    """Other parts are other names of the same file, which costs no space."""
    for part in range(1, parts):
        os.link(first, first.with_name(f"{part:05}{first.suffix}"))


def measure_reading(collection: Path) -> dict[str, float]:
    """Seconds to list the parts, to see whether they have changed, and to read every caption."""
    start = time.perf_counter()
    parts = parts_of(collection)
    listed = time.perf_counter()
    for part in parts:
        part.fingerprint()
    compared = time.perf_counter()
    count = sum(1 for part in parts for _ in part.entries())
    read = time.perf_counter()
    return {
        "captions": count,
        "list_s": listed - start,
        "compare_s": compared - listed,
        "read_s": read - compared,
        "peak_gib": peak_memory_gib(),
    }


def query() -> Tensor:
    return torch.nn.functional.normalize(_draw(0, 1), dim=-1)[0]


def drawn_features(first: int, count: int) -> Tensor:
    """Features (n, d) of the captions from this one on."""
    noise = _draw(first + 1, count)
    noise -= (noise @ query())[:, None] * query()
    generator = torch.Generator().manual_seed(first + 1)
    near = (MEAN + DEVIATION * torch.randn(count, 1, generator=generator)).clamp(-1, 1)
    return near * query() + (1 - near**2).sqrt() * torch.nn.functional.normalize(noise, dim=-1)


def _draw(seed: int, count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def build(collection: Path, indexes: Path) -> dict[str, Any]:
    """Writes the index; the nearest similarities are those of the features before rounding."""
    first, drawing_s = 0, 0.0
    best = torch.empty(0)

    def embed(texts: Sequence[str]) -> Tensor:
        nonlocal first, drawing_s, best
        start = time.perf_counter()
        features = drawn_features(first, len(texts))
        best = torch.cat([best, features @ query()]).sort(descending=True).values[:COUNT]
        first += len(texts)
        drawing_s += time.perf_counter() - start
        return features

    start = time.perf_counter()
    CaptionIndex(collection, indexes, "drawn").update(embed)
    build_s = time.perf_counter() - start - drawing_s
    return {"build_s": build_s, "build_peak_gib": peak_memory_gib(), "nearest": best.tolist()}


def measure_search(collection: Path, indexes: Path, rounds: int) -> dict[str, Any]:
    """Times, memory and results of the search, of an index that is there already."""
    imported_gib = peak_memory_gib()
    wanted = query()

    def search() -> list[float]:
        found = CaptionIndex(collection, indexes, "drawn").search(wanted, COUNT, LEAST_SIMILARITY)
        return [one.similarity for one in found]

    cold = []
    for _ in range(rounds):
        forget(indexes)
        cold.append(_seconds(search))
    times = interleaved(
        {
            "open": lambda: CaptionIndex(collection, indexes, "drawn"),
            "update": lambda: CaptionIndex(collection, indexes, "drawn").update(_never),
            "search": search,
        },
        rounds,
    )
    return {
        "cold_search_s": statistics.median(cold),
        **{f"{name}_s": times.median(name) for name in times.seconds},
        "imported_gib": imported_gib,
        "peak_gib": peak_memory_gib(),
        "found": search(),
    }


def forget(folder: Path) -> None:
    """The system drops what it remembers of the files: they are read from the disk again."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _never(texts: Sequence[str]) -> Tensor:
    raise RuntimeError(f"{len(texts)} captions are encoded a second time")


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def measure_encoding(folder: Path, rounds: int) -> dict[str, float]:
    """Captions a second through the default's text model, with random weights."""
    import open_clip

    weights = folder / "weights.pt"
    torch.manual_seed(0)
    whole = open_clip.create_model(MODEL).eval()
    torch.save(whole.state_dict(), weights)
    embed, tokenize = OpenClipText(MODEL, str(weights)), open_clip.get_tokenizer(MODEL)
    texts = regularization_captions(TIMED_CAPTIONS)
    times = interleaved(
        {
            "padded": lambda: whole.encode_text(tokenize(texts), normalize=True),
            "unpadded": lambda: embed(texts),
        },
        rounds,
    )
    return {
        "captions_a_second": TIMED_CAPTIONS / times.median("unpadded"),
        "padded_over_unpadded": times.ratio("padded", "unpadded"),
    }


def main() -> None:
    parser = options(__doc__ or "", threads=1, rounds=5)
    parser.add_argument("--parts", type=int, default=100, help=f"of {ROWS} captions each")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    results: dict[str, Any] = {}
    # Whatever is not the search runs in processes of its own, so that it counts for no memory here.
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(1, context, max_tasks_per_child=1) as other,
    ):
        indexes = Path(name) / "indexes"
        for layout, write, parts in (
            ("tables", write_tables, given.parts),
            ("shards", write_shards, given.parts),
            ("folders", write_folders, min(FOLDERS, given.parts)),
        ):
            collection = Path(name) / layout
            collection.mkdir()
            other.submit(write, collection, parts).result()
            results[layout] = read = other.submit(measure_reading, collection).result()
            print(
                f"{layout}: {read['captions']} captions in {parts} parts; list {read['list_s']:.2f}"
                f" s, see what changed {read['compare_s']:.2f} s, read {read['read_s']:.1f} s, "
                f"peak {read['peak_gib']:.2f} GiB",
                flush=True,
            )
        collection = Path(name) / "tables"
        built = other.submit(build, collection, indexes).result()
        searched = measure_search(collection, indexes, given.rounds)
        size = sum(path.stat().st_size for path in indexes.rglob("*") if path.is_file())
        pairs = list(zip(built.pop("nearest"), searched.pop("found"), strict=False))
        searched["found"] = len(pairs)
        searched["largest_difference"] = max(abs(exact - found) for exact, found in pairs)
        results["index"] = {"megabytes": size / 1e6, **built, **searched}
        print(
            f"index: {size / 1e6:.0f} MB, written in {built['build_s']:.1f} s without encoding, "
            f"peak {built['build_peak_gib']:.2f} GiB\n"
            f"  open {searched['open_s']:.4f} s, update without news {searched['update_s']:.4f} s\n"
            f"  search {searched['search_s']:.2f} s, {searched['cold_search_s']:.2f} s from disk; "
            f"peak {searched['peak_gib']:.2f} GiB, {searched['imported_gib']:.2f} before it\n"
            f"  largest difference of the {COUNT} similarities from exact ones: "
            f"{searched['largest_difference']:.1e}",
            flush=True,
        )
        encoded = other.submit(measure_encoding, Path(name), given.rounds).result()
        hours = given.parts * ROWS / encoded["captions_a_second"] / 3600
        results["encoding"] = {**encoded, "extrapolated_hours": hours}
        print(
            f"encoding: {encoded['captions_a_second']:.1f} captions a second, "
            f"{encoded['padded_over_unpadded']:.1f} times as many as with their padding; all of "
            f"them would take {hours:.1f} hours"
        )
    write_json(given.json, results)


if __name__ == "__main__":
    main()
