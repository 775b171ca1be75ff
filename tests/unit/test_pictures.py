"""Pictures of strangers: what is none is refused and named, what is one opens whatever is in it."""

from __future__ import annotations

import ast
import io
import json
import os
import socket
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from custom_diffusion.concept.errors import DataError
from custom_diffusion.pictures.opening import (
    FORMATS,
    MOST_PIXELS,
    PictureError,
    decode_picture,
    read_picture,
)
from custom_diffusion.trainer.data.captioned import check_readable
from custom_diffusion.trainer.data.folders import load_folder
from PIL import Image, ImageOps, PngImagePlugin
from support.children import ROOT, run_python

PNG_START = b"\x89PNG\r\n\x1a\n"
pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in this system's folders")


def noise(width: int = 40, height: int = 24) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def content(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """After the header, before the pixels."""
    return png[:33] + b"".join(chunks) + png[33:]


def equal(one: Image.Image, other: Image.Image) -> bool:
    return (
        one.size == other.size and one.convert("RGBA").tobytes() == other.convert("RGBA").tobytes()
    )


def test_one_place_opens_pictures_and_names_the_formats() -> None:
    """`open` of Pillow's, under whatever name it was imported."""
    found = []
    for path in ROOT.rglob("*.py"):
        inside = path.relative_to(ROOT)
        if inside.parts[0] in ("tests", "benchmarks") or inside.parts[0].startswith("."):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("PIL"):
                assert "open" not in [name.name for name in node.names], inside
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                found.append((inside.as_posix(), [keyword.arg for keyword in node.keywords]))
    assert found == [("pictures/opening.py", ["formats"])]


# What is no file


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        os.chdir(path.parent)  # the names of sockets are short
        try:
            server.bind(path.name)
        finally:
            os.chdir(before)


def folder(path: Path) -> None:
    path.mkdir()


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


NO_FILES = [pipe, endless_device, listening_socket, folder, link_to_nothing]


@pipes
@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", NO_FILES)
def test_what_is_no_file_is_named_and_not_waited_for(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    noise().save(tmp_path / "good.png")
    make(tmp_path / "bad.png")
    make(tmp_path / "good.mask.png")
    with pytest.raises(DataError) as caught:
        check_readable(load_folder(tmp_path, "a <new1> cat"))
    lines = str(caught.value).splitlines()
    assert [name for line in lines for name in ("bad.png", "good.mask.png") if name in line] == [
        "bad.png",
        "good.mask.png",
    ]
    make(tmp_path / "good.txt")
    with pytest.raises(DataError, match=r"The caption .*good\.txt cannot be read"):
        load_folder(tmp_path, "a <new1> cat")


@pipes
def test_a_link_to_a_picture_elsewhere_opens(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    noise().save(tmp_path / "elsewhere.png")
    (tmp_path / "set" / "a.png").symlink_to(tmp_path / "elsewhere.png")
    (image,) = load_folder(tmp_path / "set", "a <new1> cat")
    assert equal(image.open().image, noise())


def test_files_of_any_size_are_refused_before_they_are_read(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png")
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(4 << 30)
    with pytest.raises(DataError, match=r"a\.txt cannot be read \(it is larger than 0\.064 MB\)"):
        load_folder(tmp_path, "a <new1> cat")
    with open(tmp_path / "b.png", "wb") as file:
        file.truncate(4 << 30)
    with pytest.raises(PictureError, match=r"b\.png .*\(it is larger than 500 MB\)"):
        read_picture(tmp_path / "b.png")


# What is no picture that we take


def other_formats() -> list[str]:
    Image.init()
    return sorted(set(Image.SAVE) - {*FORMATS, "MPO", "PDF"})


@pytest.mark.parametrize("format", other_formats())
def test_other_formats_are_refused_whatever_they_are_called(format: str, tmp_path: Path) -> None:
    image = noise(32, 32)
    path = tmp_path / "a.png"
    for mode in ("RGB", "L", "1", "P", "RGBA", "F"):
        try:
            path.write_bytes(content(image.convert(mode), format))
            break
        except (OSError, ValueError, KeyError):
            continue
    else:
        pytest.skip(f"this Pillow writes no {format}")
    with pytest.raises(PictureError, match=r"a\.png cannot be read as a picture"):
        read_picture(path)


@pytest.mark.parametrize(
    "start",
    [
        *(
            b"GRIB\0\0\0\1",
            b"BUFR\0\0\0\4",
            b"\x89HDF\r\n\x1a\n",
            b"SIMPLE  =                    T",
        ),
        *(
            b"\xd7\xcd\xc6\x9a\0\0",
            b"\1\0\0\0\x6c\0\0\0",
            b"%PDF-1.4",
            b"%!PS-Adobe-3.0 EPSF-3.0\n",
        ),
        *(
            b"8BPS\0\1",
            b"\x1c\x02\x03\0\x02",
            b"PCD_IPI",
            b"#define a_width 8\n",
            b"P6 1 1 255 abc",
        ),
    ],
)
def test_content_of_stubs_and_programs_is_refused(start: bytes) -> None:
    with pytest.raises(PictureError, match="x cannot be read as a picture .it is none of PNG"):
        decode_picture(start + bytes(4000), "x")


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
@pytest.mark.slow
def test_postscript_starts_no_other_program(tmp_path: Path) -> None:
    """Pillow alone does, which shows that the stand-in works."""
    programs, mark = tmp_path / "programs", tmp_path / "mark"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\necho ran >> {mark}\n")
    (programs / "gs").chmod(0o755)
    (tmp_path / "set").mkdir()
    noise().save(tmp_path / "set" / "a.png", "EPS")
    opening = {
        "ours": f"""
from pathlib import Path
from custom_diffusion.concept.errors import DataError
from custom_diffusion.trainer.data.captioned import check_readable
from custom_diffusion.trainer.data.folders import load_folder
try:
    check_readable(load_folder(Path({str(tmp_path / "set")!r}), "a cat"))
except DataError as error:
    print("refused")
""",
        "Pillow's": f"""
from PIL import Image
try:
    Image.open({str(tmp_path / "set" / "a.png")!r}).load()
except OSError:
    print("ran")
""",
    }
    path = f"{programs}:{os.environ['PATH']}"
    assert run_python(opening["ours"], PATH=path) == "refused"
    assert not mark.exists()
    assert run_python(opening["Pillow's"], PATH=path) == "ran"
    assert mark.exists()


# Texts and other things that are no pixels


@pytest.mark.parametrize("packed", [True, False])
def test_a_picture_of_comfyui_opens_with_three_megabytes_of_workflow(
    packed: bool, tmp_path: Path
) -> None:
    nodes = [{"id": number, "type": "KSampler", "seed": number**3} for number in range(70_000)]
    notes = PngImagePlugin.PngInfo()
    notes.add_text("workflow", json.dumps({"nodes": nodes}), zip=packed)
    path = tmp_path / "ComfyUI_00001_.png"
    noise().save(path, pnginfo=notes)
    if packed:
        with pytest.raises(ValueError, match="Decompressed data too large"):
            Image.open(path)
    else:
        assert path.stat().st_size > 3_000_000
    assert equal(read_picture(path), noise())


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory")
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.slow
def test_two_hundred_megabytes_of_packed_text_are_not_unpacked(kind: bytes, tmp_path: Path) -> None:
    packed = zlib.compress(bytes(200_000_000), 9)
    start = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[kind]
    bomb = chunk(kind, start + packed)
    (tmp_path / "a.png").write_bytes(with_chunks(content(noise(), "PNG"), *[bomb] * 30))
    code = f"""
from pathlib import Path
from custom_diffusion.pictures.opening import read_picture
before = peak_mb()
assert read_picture(Path({str(tmp_path / "a.png")!r})).size == (40, 24)
print(peak_mb() - before)
"""
    assert float(run_python(code)) < 50


@pytest.mark.timeout(20)
def test_a_long_comment_of_a_gif_or_jpeg_costs_no_minutes() -> None:
    """Pillow adds each piece of a JPEG's EXIF to a copy of those before."""
    gif = content(noise(), "GIF")
    table = 13 + (3 << (gif[10] & 7) + 1)
    comment = b"\x21\xfe" + (b"\xff" + bytes([65]) * 255) * 100_000 + b"\0"
    opened = decode_picture(gif[:table] + comment + gif[table:], "a.gif")
    assert equal(opened, decode_picture(gif, "a.gif"))
    jpeg = content(noise(), "JPEG")
    exif = b"\xff\xff\xe1\xff\xffExif\0\0" + bytes(0xFFFF - 8)
    opened = decode_picture(jpeg[:2] + exif * 2000 + jpeg[2:], "a.jpg")
    assert equal(opened, decode_picture(jpeg, "a.jpg"))


def tiff_of_the_same_bytes(tags: int) -> bytes:
    """Each of the tags means almost all of the file."""
    total = 8 + 2 + 12 * tags + 4 + 100_000
    entries = (struct.pack("<HHII", 40000 + n, 7, total - 100, 50) for n in range(tags))
    return struct.pack("<2sHIH", b"II", 42, 8, tags) + b"".join(entries) + bytes(100_004)


@pytest.mark.parametrize("order", "<>")
def test_a_tile_that_is_larger_than_any_picture_is_refused(order: str) -> None:
    """A decoder makes room for it, and a few packed kilobytes fill it."""
    edges = [(256, 10), (257, 10), (322, 46_336), (323, 46_336)]
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, edge, 0) for tag, edge in edges)
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(edges))
    with pytest.raises(PictureError, match=r"its tags claim too much"):
        decode_picture(start + entries + bytes(100), "a.tif")


def test_tags_that_together_are_longer_than_the_file_are_refused() -> None:
    with pytest.raises(PictureError, match=r"a\.tif .*its tags claim too much"):
        decode_picture(tiff_of_the_same_bytes(20_000), "a.tif")
    inner = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x8769, 4, 1, 26, 0)
    with pytest.raises(PictureError, match=r"its tags claim too much"):
        decode_picture(inner + tiff_of_the_same_bytes(20_000)[8:], "a.tif")
    big = struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, 1 << 40) + bytes(1000)
    with pytest.raises(PictureError, match=r"its tags claim too much"):
        decode_picture(big, "a.tif")


# Which side is up


XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def in_png_chunk(orientation: int) -> bytes:
    return content(noise(), "PNG", exif=exif_of(orientation))


def in_png_xmp(orientation: int) -> bytes:
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", XMP.format(orientation))
    return content(noise(), "PNG", pnginfo=notes)


def in_png_profile(orientation: int, packed: bool = True) -> bytes:
    """As ImageMagick 6 keeps what a JPEG had."""
    data = exif_of(orientation).tobytes()
    notes = PngImagePlugin.PngInfo()
    text = f"\nexif\n{len(data):8}\n{data.hex()}\n"
    notes.add_text("Raw profile type exif", text, zip=packed)
    return content(noise(), "PNG", pnginfo=notes)


def in_png_plain_profile(orientation: int) -> bytes:
    return in_png_profile(orientation, packed=False)


def in_jpeg(orientation: int) -> bytes:
    return content(noise(), "JPEG", exif=exif_of(orientation), comment=b"a" * 1000)


def in_jpeg_xmp(orientation: int) -> bytes:
    jpeg = content(noise(), "JPEG")
    data = b"http://ns.adobe.com/xap/1.0/\0" + XMP.format(orientation).encode()
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data + jpeg[2:]


def in_webp(orientation: int) -> bytes:
    return content(noise(), "WEBP", lossless=True, exif=exif_of(orientation))


def in_tiff(orientation: int) -> bytes:
    return content(noise(), "TIFF", exif=exif_of(orientation))


@pytest.mark.parametrize(
    "make",
    [
        *(in_png_chunk, in_png_xmp, in_png_profile, in_png_plain_profile),
        *(in_jpeg, in_jpeg_xmp, in_webp, in_tiff),
    ],
)
def test_every_picture_is_turned_as_pillow_turns_it(make: Callable[[int], bytes]) -> None:
    for orientation in range(1, 9):
        file = make(orientation)
        with Image.open(io.BytesIO(file)) as image:
            turned = ImageOps.exif_transpose(image)
        assert equal(decode_picture(file, "a"), turned)
    assert turned.size == (24, 40)


def odd_exif(entries: list[bytes], rest: bytes = b"") -> bytes:
    """EXIF with an orientation of a quarter turn among other entries, which follow their tags."""
    entries = sorted([*entries, struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)])
    start = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries))
    return start + b"".join(entries) + bytes(4) + rest


ODD_EXIF = [
    odd_exif([struct.pack(">HHII", 0x011A, 5, 1, 50)], bytes(40)),  # 0/0 dots an inch
    odd_exif([struct.pack(">HHII", 0x011A, 5, 1, 1 << 31)]),  # beyond the end
    odd_exif([struct.pack(">HHII", 0x8769, 4, 1, 8)]),  # a directory in itself
    odd_exif([struct.pack(">HHII", 0x9286, 99, 1 << 30, 0)]),  # an unknown type
    odd_exif([struct.pack(">HHI4s", 0x010F, 2, 4, b"\xff\xfe\xfd\xfc")]),  # no ASCII
    odd_exif([struct.pack(">HHII", 0x8825, 5, 1 << 29, 8)]),  # far more than there is
]


@pytest.mark.parametrize("exif", ODD_EXIF)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_odd_exif_still_says_which_side_is_up(exif: bytes) -> None:
    for format in ("JPEG", "PNG", "WEBP"):
        opened = decode_picture(content(noise(), format, exif=exif), "a")
        plain = decode_picture(content(noise(), format), "a")
        assert equal(opened, plain.transpose(Image.Transpose.ROTATE_270))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0MM",
        b"Exif\0\0xx\0*\0\0\0\x08",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        odd_exif([])[:-9],
        odd_exif([]).replace(struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0), bytes(12)),
        odd_exif([]).replace(struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0), b"\x01\x12" + b"\xff" * 10),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_exif_refuses_no_pixels(exif: bytes) -> None:
    for format in ("JPEG", "PNG", "WEBP"):
        opened = decode_picture(content(noise(), format, exif=exif), "a")
        assert equal(opened, decode_picture(content(noise(), format), "a"))


# Pixels


def several(format: str) -> bytes:
    frames = [noise().point(lambda shade, n=n: shade // n) for n in (2, 3, 4)]
    return content(frames[0], format, save_all=True, append_images=frames[1:])


FILES = {
    "png": lambda: content(noise(), "PNG"),
    "palette": lambda: content(noise().quantize(7), "PNG", transparency=3),
    "alpha": lambda: content(noise().convert("RGBA"), "PNG"),
    "apng": lambda: several("PNG"),
    "jpeg": lambda: content(noise(), "JPEG"),
    "progressive": lambda: content(noise(), "JPEG", progressive=True, quality=95),
    "grey": lambda: content(noise().convert("L"), "JPEG"),
    "cmyk": lambda: content(noise().convert("CMYK"), "JPEG"),
    "mpo": lambda: several("MPO"),
    "webp": lambda: content(noise(), "WEBP"),
    "animated webp": lambda: several("WEBP"),
    "bmp": lambda: content(noise(), "BMP"),
    "tiff": lambda: content(noise(), "TIFF"),
    "packed tiff": lambda: content(noise(), "TIFF", compression="tiff_lzw"),
    "pages": lambda: several("TIFF"),
    "gif": lambda: content(noise(), "GIF", comment=b"by a camera"),
    "animated gif": lambda: several("GIF"),
}


@pytest.mark.parametrize("name", FILES)
def test_the_first_frame_has_the_pixels_that_pillow_reads(name: str) -> None:
    file = FILES[name]()
    with Image.open(io.BytesIO(file)) as image:
        assert equal(decode_picture(file, name), image)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore")
def test_a_file_that_ends_early_is_a_picture_or_named(name: str) -> None:
    """At every length."""
    file = FILES[name]()
    refused = 0
    for length in range(0, len(file), max(1, len(file) // 300)):
        try:
            decode_picture(file[:length], "the file")
        except PictureError as error:
            assert "the file cannot be read as a picture" in str(error)
            refused += 1
    assert refused > 5


def claimed(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return PNG_START + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width, height", [(1, MOST_PIXELS + 1), (11_000, 11_000), (1 << 30, 4)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_they_are_decoded(width: int, height: int) -> None:
    with pytest.raises(PictureError, match="x has more than 120 megapixels.*make it smaller"):
        decode_picture(claimed(width, height), "x")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_phones_108_megapixels_open(tmp_path: Path) -> None:
    Image.new("1", (12_000, 9_000), 1).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").size == (12_000, 9_000)
