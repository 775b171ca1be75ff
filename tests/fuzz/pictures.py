"""Looks for pictures, captions and collections that cannot be coped with: `python
tests/fuzz/pictures.py CORPUS [libFuzzer's options]`, in an environment with `pip install atheris`
and this package.

Reading may give pictures and captions or raise a DataError that names the file. Everything else is
a finding: another exception, a hang (`-timeout=10`), or memory beyond `-rss_limit_mb`. The first
byte of an input says what it is: a file of each format, mutated byte by byte; one whose chunks,
segments, blocks or tags are put together anew, so that it comes past the containers; a caption; a
shard, as it is or of members that are put together; a table, as it is or of odd rows.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["custom_diffusion", "PIL", "tarfile"]):
    import PIL.Image
    from custom_diffusion.concept.errors import DataError
    from custom_diffusion.merge.captions import read_captions
    from custom_diffusion.trainer.data.captioned import check_readable
    from custom_diffusion.trainer.data.folders import load_folder
    from custom_diffusion.trainer.regularization.collection import parts_of

import pyarrow
import pyarrow.parquet

PIL.Image.init()
EDGES = (0, 1, 2, 3, 7, 255, 256, 10_954, 65_535, 1 << 16, (1 << 31) - 1, (1 << 32) - 1)
PNG_CHUNKS = (
    *(b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"iCCP"),
    *(b"acTL", b"fcTL", b"fdAT", b"pHYs", b"cHRM", b"gAMA", b"sRGB", b"CgBI", b"\0\0\0\0"),
)
PNG_TEXTS = (b"XML:com.adobe.xmp\0\0\0\0\0", b"Raw profile type exif\0\0", b"exif\0", b"a\0\0")
JPEG_MARKERS = (0xC0, 0xC2, 0xC4, 0xDB, 0xDD, 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xFF, 0xD8, 0xDA)
TIFF_TAGS = (
    *(256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 282, 283, 284, 296, 317, 320, 322, 323),
    *(324, 325, 338, 339, 347, 530, 700, 33723, 34665, 34675, 34853, 37724, 40965),
)
PAX_KEYS = (
    *(b"size", b"path", b"linkpath", b"hdrcharset", b"GNU.sparse.major", b"GNU.sparse.minor"),
    *(b"GNU.sparse.map", b"GNU.sparse.size", b"GNU.sparse.realsize"),
)
COMPRESSIONS = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34925, 50000, 50001)
Provider = atheris.FuzzedDataProvider


def number(data: Provider) -> int:
    if data.ConsumeBool():
        return int(data.PickValueInList(list(EDGES)))
    return int(data.ConsumeIntInRange(0, 300))


def described_exif(data: Provider) -> bytes:
    return b"Exif\0\0" + described_tiff(data)


def described_tiff(data: Provider) -> bytes:
    """A directory, perhaps one that means itself, or is larger than it."""
    order = data.PickValueInList(["<", ">"])
    tags = sorted(
        (
            data.PickValueInList(list(TIFF_TAGS)),
            data.ConsumeIntInRange(0, 19),
            number(data) if not data.ConsumeIntInRange(0, 50) else data.ConsumeIntInRange(0, 4),
            data.PickValueInList([*COMPRESSIONS, 0, 1, 2, 7, 8, 16, 26, 100, 255, 65_535]),
        )
        for _ in range(data.ConsumeIntInRange(0, 20))
    )
    if data.ConsumeBool():  # what a picture needs
        width, height = number(data), number(data)
        tags = [
            *((256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, data.PickValueInList([1, 8]))),
            (259, 3, 1, data.PickValueInList(list(COMPRESSIONS))),
            *((262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height)),
            (279, 4, 1, number(data)),
            *tags,
        ]
    entries = b"".join(struct.pack(f"{order}HHII", *tag) for tag in tags)
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return (
        start
        + entries
        + struct.pack(f"{order}I", number(data))
        + data.ConsumeBytes(200)
        + bytes(3000)
    )


def described_png(data: Provider) -> bytes:
    file = b"\x89PNG\r\n\x1a\n"
    width, height = number(data), number(data)
    kinds = data.PickValueInList([(1, 0), (8, 0), (16, 0), (8, 2), (8, 3), (8, 4), (8, 6), (3, 9)])
    parts = [(b"IHDR", struct.pack(">II5B", width, height, *kinds, 0, 0, data.ConsumeBool()))]
    for _ in range(data.ConsumeIntInRange(0, 8)):
        kind = data.PickValueInList(list(PNG_CHUNKS))
        content = data.ConsumeBytes(data.ConsumeIntInRange(0, 60))
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            packed = zlib.compress(bytes(number(data) % 3_000_000) + content)
            content = data.PickValueInList(list(PNG_TEXTS)) + packed
        elif kind == b"eXIf":
            content = described_tiff(data)
        parts.append((kind, content))
    pixels = bytes(min(1_000_000, (width * 4 + 1) * height))
    parts += [(b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    for kind, content in parts:
        length = len(content) if data.ConsumeIntInRange(0, 20) else number(data)
        checksum = zlib.crc32(kind + content)
        file += struct.pack(">I", length) + kind + content + struct.pack(">I", checksum)
    return file


def described_jpeg(data: Provider) -> bytes:
    extra = b""
    for _ in range(data.ConsumeIntInRange(0, 6)):
        marker = data.PickValueInList(list(JPEG_MARKERS))
        content = described_exif(data) if marker == 0xE1 else data.ConsumeBytes(40)
        length = len(content) + 2 if data.ConsumeIntInRange(0, 9) else number(data)
        extra += bytes([0xFF] * data.ConsumeIntInRange(1, 3) + [marker])
        extra += struct.pack(">H", length & 0xFFFF) + content
    return SEEDS["JPEG"][:2] + extra + SEEDS["JPEG"][2:]


def described_gif(data: Provider) -> bytes:
    seed = SEEDS["GIF"]
    table = 13 + (3 << (seed[10] & 7) + 1)
    extra = b""
    for _ in range(data.ConsumeIntInRange(0, 6)):
        extra += b"\x21" + bytes([data.PickValueInList([0xF9, 0xFE, 0xFF, 0x01, 0x2C])])
        for _ in range(data.ConsumeIntInRange(0, 3)):
            block = data.ConsumeBytes(data.ConsumeIntInRange(0, 30))
            extra += bytes([len(block)]) + block
        extra += b"\0"
    screen = struct.pack("<HH", number(data) & 0xFFFF, number(data) & 0xFFFF)
    return seed[:6] + screen + seed[10:table] + extra + seed[table:]


def described_bmp(data: Provider) -> bytes:
    bits, packing = (data.PickValueInList([0, 1, 2, 3, 4, 8, 16, 24, 32]) for _ in range(2))
    size = data.PickValueInList([12, 40, 52, 64, 108, 124, 0, 1 << 30])
    header = struct.pack("<IIIHHIIIIII", size, number(data), number(data), 1, bits, packing,
                         number(data), 0, 0, number(data), 0)  # fmt: skip
    start = struct.pack("<2sIHHI", b"BM", 100, 0, 0, data.PickValueInList([54, 0, 1 << 31, 60]))
    return start + header + data.ConsumeBytes(300)


def described_webp(data: Provider) -> bytes:
    seed, extra = SEEDS["WEBP"], b""
    for _ in range(data.ConsumeIntInRange(0, 4)):
        kind = data.PickValueInList([b"VP8X", b"EXIF", b"XMP ", b"ICCP", b"ANIM", b"ANMF", b"ALPH"])
        content = described_exif(data) if kind == b"EXIF" else data.ConsumeBytes(40)
        extra += kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
    body = seed[12:] + extra if data.ConsumeBool() else extra + seed[12:]
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


PICTURES: tuple[Callable[[Provider], bytes], ...] = (
    *(described_png, described_jpeg, described_gif, described_bmp, described_webp, described_tiff),
)


def described_shard(data: Provider) -> bytes:
    file = b""
    for _ in range(data.ConsumeIntInRange(1, 6)):
        name = data.PickValueInList(
            ["a.txt", "a.png", "a.json", "../b.png", "/b.png", "a", "\udcff"]
        )
        member = tarfile.TarInfo(name)
        member.type = data.PickValueInList([b"0", b"1", b"2", b"3", b"5", b"6", b"L", b"K", b"S",
                                            b"x", b"g", b"X", b"\0", b"7", b"z"])  # fmt: skip
        content = data.ConsumeBytes(data.ConsumeIntInRange(0, 60))
        if member.type in (b"x", b"g", b"X"):
            record = b" " + data.PickValueInList(list(PAX_KEYS)) + b"=" + content + b"\n"
            content = str(len(record) + 2).encode() + record
        member.size = len(content) if data.ConsumeIntInRange(0, 5) else number(data)
        member.linkname = "a.txt"
        header = bytearray(member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        if not data.ConsumeIntInRange(0, 5):
            header[124:136] = (b"\xff" * 4 + data.ConsumeBytes(8)).ljust(12, b"\0")
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
        file += bytes(header) + content + bytes(-len(content) % 512)
    return file + bytes(1024)


def described_table(data: Provider) -> bytes:
    texts = [data.ConsumeUnicodeNoSurrogates(20) for _ in range(data.ConsumeIntInRange(0, 5))]
    places = [
        data.PickValueInList(["a.png", "../a.png", "/dev/zero", "C:\\a.png", text, text + ".png"])
        for text in texts
    ]
    names = [data.PickValueInList(["caption", "text", "TEXT"]),
             data.PickValueInList(["path", "key", "file_name"])]  # fmt: skip
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table([texts, places], names), file)
    return file.getvalue()


def test_one_input(content: bytes) -> None:
    kind, content = content[:1], content[1:]
    data = Provider(content)
    try:
        if kind in (b"s", b"S", b"t", b"T"):
            ending = "tar" if kind in (b"s", b"S") else "parquet"
            if kind == b"S":
                content = described_shard(data)
            elif kind == b"T":
                content = described_table(data)
            read_collection(f"a.{ending}", content)
        elif kind == b"c":
            read_caption(content)
        else:
            read_one_picture(
                data.PickValueInList(list(PICTURES))(data) if kind == b"P" else content
            )
    except DataError as error:
        assert any(name in str(error) for name in (str(FOLDER), "a.txt", "a.png")), error


def read_one_picture(content: bytes) -> None:
    (FOLDER / "set" / "a.png").write_bytes(content)
    check_readable(load_folder(FOLDER / "set", "a cat"))


def read_caption(content: bytes) -> None:
    (FOLDER / "captions" / "a.txt").write_bytes(content)
    try:
        load_folder(FOLDER / "captions", "a cat")
    finally:
        read_captions(FOLDER / "captions" / "a.txt")


def read_collection(name: str, content: bytes) -> None:
    folder = FOLDER / name.partition(".")[2]
    (folder / name).write_bytes(content)
    for part in parts_of(folder):
        for entry in part.entries():
            str(entry.caption).encode()
            try:
                picture = part.read(entry)
            except DataError as error:
                assert str(folder) in str(error)
            else:
                assert picture != SECRET and len(picture) <= len(content)


def seeds() -> dict[str, bytes]:
    result = {}
    for format in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        file = io.BytesIO()
        PIL.Image.linear_gradient("L").resize((9, 7)).convert("RGB").save(file, format)
        result[format] = file.getvalue()
    for compression in ("tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate", "group4"):
        file = io.BytesIO()
        mode = "1" if compression == "group4" else "RGB"
        PIL.Image.new(mode, (9, 7)).save(file, "TIFF", compression=compression)
        result[compression] = file.getvalue()
    return result


def write_seeds(corpus: Path) -> None:
    for name, content in SEEDS.items():
        (corpus / name).write_bytes(b"p" + content)
    for number in range(8):
        drawn = os.urandom(400)
        for kind in (b"P", b"S", b"T"):
            (corpus / f"described-{kind.decode()}-{number}").write_bytes(kind + drawn)
        (corpus / f"s-{number}").write_bytes(b"s" + described_shard(Provider(drawn)))
        (corpus / f"t-{number}").write_bytes(b"t" + described_table(Provider(drawn)))
    (corpus / "caption").write_bytes(b"c\xef\xbb\xbfa cat\r\n" * 25)


SECRET = b"not a part of any collection"
SEEDS = seeds()

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        FOLDER = Path(folder)
        for name in ("set", "captions", "tar", "parquet"):
            (FOLDER / name).mkdir()
        (FOLDER / "a.png").write_bytes(SECRET)
        PIL.Image.new("RGB", (3, 3)).save(FOLDER / "captions" / "a.png")
        corpus = next((Path(a) for a in sys.argv[1:] if not a.startswith("-")), None)
        if corpus and not any(corpus.glob("*")):
            corpus.mkdir(exist_ok=True)
            write_seeds(corpus)
        atheris.Setup(sys.argv, test_one_input)
        atheris.Fuzz()
