"""Pictures of every format and mode that are broken somewhere, always the same ones.

`python tests/support/mutants.py COUNT` opens so many, and counts what comes of them and what
escapes: any error that is no DataError, or that does not name the file.
"""

from __future__ import annotations

import io
import random
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000", "TGA")
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "LAB", "YCbCr", "I", "F", "I;16")
EDGES = (0, 1, 2, 3, 5, 8, 16, 127, 128, 254, 255)


def seeds() -> list[bytes]:
    """Small pictures in every mode that a format has, with EXIF and text where it has them."""
    shades = np.random.default_rng(0).integers(0, 256, (24, 17, 3), dtype=np.uint8)
    plain = Image.fromarray(shades)
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x011A: 72.0, 0x010F: "camera"})
    notes = PngImagePlugin.PngInfo()
    notes.add_text("workflow", "{}" * 500, zip=True)
    found = []
    for format in FORMATS:
        extra = {"PNG": {"pnginfo": notes}, "TIFF": {"compression": "tiff_lzw"}}.get(format, {})
        for mode in MODES:
            for options in ({**extra, "exif": exif}, {}):
                file = io.BytesIO()
                try:
                    _in(plain, mode).save(file, format, **options)
                except (OSError, ValueError, KeyError, SystemError):
                    continue  # a format without this mode
                found.append(file.getvalue())
    return found


def mutants(count: int, seed: int = 0) -> Iterator[bytes]:
    """Bytes set, cut out, doubled, and put together from two files, at one to four places."""
    drawn, files = random.Random(seed), seeds()
    for number in range(count):
        content = bytearray(files[number % len(files)])
        reach = drawn.choice((64, 300, len(content)))  # headers are where the odd things are
        for _ in range(drawn.choice((1, 1, 2, 4))):
            place = drawn.randrange(max(1, min(reach, len(content))))
            length = drawn.choice((1, 1, 2, 4, 8))
            what = drawn.randrange(6)
            if what < 3:
                content[place : place + length] = bytes(drawn.choices(EDGES, k=length))
            elif what == 3:
                del content[place : place + length]
            elif what == 4:
                content[place:place] = content[place : place + length] * drawn.randint(1, 9)
            else:
                other = drawn.choice(files)
                content[place:] = other[place:] if drawn.random() < 0.3 else content[place:-length]
        yield bytes(content)


def _in(plain: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(plain.convert("L")).astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(np.asarray(plain.convert("L")).astype(np.float32) / 255)
    if mode == "LAB":
        return Image.frombytes("LAB", plain.size, plain.tobytes())
    return plain.convert(mode)


def main(count: int) -> None:
    from custom_diffusion.concept.errors import DataError
    from custom_diffusion.trainer.data.captioned import CaptionedImage

    warnings.simplefilter("ignore")
    ends: Counter[str] = Counter()
    path = Path("/dev/shm") / f"mutant{random.random()}.png"
    for content in mutants(count):
        path.write_bytes(content)
        try:
            CaptionedImage(path, "a cat").open()
            ends["opened"] += 1
        except DataError as error:
            ends["named" if path.name in str(error) else "refused without its name"] += 1
        except Exception as error:  # noqa: BLE001  (what escapes is what is counted)
            ends[f"escaped: {type(error).__name__}: {error}"[:100]] += 1
    path.unlink()
    for end, times in ends.most_common():
        print(f"{times:8} {end}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import conftest  # noqa: F401  (makes the pack importable)

    main(int(sys.argv[1]))
