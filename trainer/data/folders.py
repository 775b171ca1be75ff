"""Folders of pictures, with the captions, masks and repeats that lie there.

Names are those of the tools that people come from: kohya's `10_cat` and `.caption`, OneTrainer's
`-masklabel.png`. What is left out is said, not passed over.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...concept.errors import DataError
from ...concept.regular_files import read_regular
from ...pictures.opening import IMAGE_SUFFIXES
from .captioned import MOST_REPEATS, CaptionedImage

CAPTION_SUFFIXES = (".txt", ".caption")
"""Beside a picture, of any case; the first that says something counts."""
MASK_ENDINGS = (".mask", "-masklabel")
"""`cat1.mask.png` beside `cat1.jpg` says where the picture counts: in the white. Never a picture
itself.
"""
PAIRED_MASK_ENDINGS = ("_mask", "-mask")
"""A mask where the picture is there, too; else `carnival_mask.png` is a picture."""
UNREAD_SUFFIXES = (
    *(".heic", ".heif", ".jxl", ".jp2", ".j2k", ".jpx", ".tga", ".ico", ".icns", ".ppm", ".pgm"),
    *(".pbm", ".psd", ".xcf", ".kra", ".exr", ".hdr", ".dds", ".svg", ".pcx", ".qoi", ".eps"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".mp4", ".mov", ".webm"),
)
"""Pictures for other programs, which are counted and said"""
MOST_CAPTION_BYTES = 64_000
_MOST_FILES_INSIDE = 10_000
_REPEATED_FOLDER = re.compile(r"(\d+)_(.*)")


@dataclass(frozen=True)
class _Listing:
    """What lies in one folder, by what it is."""

    files: list[Path]
    pictures: list[Path]
    """Whatever is called like one: what is none is refused when it is opened."""
    masks: dict[str, Path]
    """Of the picture of that name without its ending, in lower case"""
    captions: dict[str, list[Path]]
    """Of the picture of that name without its ending; those to read first come first"""

    @staticmethod
    def of(folder: Path) -> _Listing:
        files = _listed(folder)
        called = [p for p in files if _is_called_picture(p) and not p.name.startswith(".")]
        stems = {path.stem.lower() for path in called}
        masks: dict[str, Path] = {}
        pictures = []
        for path in called:
            stem = path.stem.lower()
            of = next((stem[: -len(end)] for end in MASK_ENDINGS if stem.endswith(end)), None)
            for end in PAIRED_MASK_ENDINGS:
                if of is None and stem.endswith(end) and stem[: -len(end)] in stems:
                    of = stem[: -len(end)]
            if of is None:
                pictures.append(path)
            else:
                masks.setdefault(of, path)
        captions: dict[str, list[Path]] = {}
        for suffix in CAPTION_SUFFIXES:
            for path in files:
                if path.suffix.lower() == suffix:
                    captions.setdefault(path.stem, []).append(path)
        return _Listing(files, pictures, masks, captions)

    def lines(self, picture: Path) -> list[str]:
        """Of the first file beside a picture that says something."""
        return next(filter(None, map(_lines_of, self.captions.get(picture.stem, []))), [])


def load_folder(folder: Path, default_caption: str) -> tuple[CaptionedImage, ...]:
    """Every picture of a folder, by name, with the first line of the `.txt` or `.caption` and the
    mask in the `.mask.png` beside it where there are such files.

    Pictures in a folder inside, `10_cat`, have that many repeats, as kohya's scripts have it.
    Raises DataError when the folder is missing, holds no picture, or means too many repeats.
    """
    if not os.path.isdir(folder):
        raise DataError(f"There is no folder {folder}. Make it and put the pictures in.")
    images = _images(_Listing.of(folder), default_caption)
    for inner in _folders_in(folder):
        repeated = _REPEATED_FOLDER.fullmatch(inner.name)
        if repeated and (listing := _Listing.of(inner)).pictures:
            images += _images(listing, default_caption, _repeats(inner, *repeated.groups()))
    if not images:
        left_out = "".join(f" {sentence}" for sentence in _left_out(folder))
        raise DataError(
            f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)}). Put 4 to 20 pictures of "
            f"the concept there.{left_out}"
        )
    return tuple(images)


def pictures_in(folder: Path) -> list[Path]:
    """The pictures directly in a folder, by name. Raises DataError where it cannot be read."""
    if not os.path.isdir(folder):
        raise DataError(f"There is no folder {folder}. Make it and put the pictures in.")
    return _Listing.of(folder).pictures


def files_beside(picture: Path) -> list[Path]:
    """Captions and mask of a picture, without those that another picture has too."""
    listing = _Listing.of(picture.parent)
    if any(path.stem == picture.stem and path != picture for path in listing.pictures):
        return []
    mask = listing.masks.get(picture.stem.lower())
    return [*listing.captions.get(picture.stem, []), *([mask] if mask else [])]


def folder_advice(folder: Path) -> Iterator[str]:
    """One sentence for each kind of thing in a folder that `load_folder` does not use."""
    yield from _left_out(folder)
    for place in _read_folders(folder):
        listing = _Listing.of(place)
        if several := [path.name for path in listing.pictures if len(listing.lines(path)) > 1]:
            yield (
                f"Of captions with several lines the first is taken, unless caption_lines is "
                f"any: {some(several)}."
            )
        stems = {path.stem.lower() for path in listing.pictures}
        if lonely := [mask.name for stem, mask in listing.masks.items() if stem not in stems]:
            yield f"Masks without a picture are not used: {some(lonely)}."


def _left_out(folder: Path) -> Iterator[str]:
    read = _read_folders(folder)
    files = [path for place in read for path in _listed(place)]
    kinds = Counter(p.suffix.lower() for p in files if p.suffix.lower() in UNREAD_SUFFIXES)
    if kinds:
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        yield f"Not read, because of their kind: {counted}. Export them as PNG or JPEG to use them."
    if hidden := [p.name for p in files if p.name.startswith(".") and _is_called_picture(p)]:
        yield f"Hidden files are not read: {some(hidden)}."
    inside = Counter(
        os.path.relpath(path.parent, folder)
        for path in _files_below([one for one in _folders_in(folder) if one not in read])
        if _is_called_picture(path)
    )
    if inside:
        yield (
            f"{sum(inside.values())} pictures in folders inside are not read: "
            f"{some(sorted(inside))}. Move them up, or call their folder '1_' and a name."
        )


def _images(listing: _Listing, default_caption: str, repeats: int = 1) -> list[CaptionedImage]:
    images = []
    for path in listing.pictures:
        lines = listing.lines(path)
        caption, choices = next(iter(lines), default_caption), lines if len(lines) > 1 else ()
        mask = listing.masks.get(path.stem.lower())
        images.append(CaptionedImage(path, caption, mask, repeats, choices=tuple(choices)))
    return images


def _repeats(folder: Path, number: str, rest: str) -> int:
    if 1 <= int(number) <= MOST_REPEATS:
        return int(number)
    raise DataError(
        f"The folder {folder} means that each of its pictures counts {int(number)} times: a number "
        f"before an underscore is that of repeats, 1 to {MOST_REPEATS}. Rename it: to "
        f"'1_{rest or 'pictures'}' to use its pictures, to '{rest or 'pictures'}' not to."
    )


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"The folder {folder} cannot be read ({error.strerror}). Allow it, or move it away."
        ) from error


def _folders_in(folder: Path) -> list[Path]:
    return [path for path in _listed(folder) if os.path.isdir(path)]


def _read_folders(folder: Path) -> list[Path]:
    """It, and those inside whose names say how often their pictures count."""
    return [folder, *(one for one in _folders_in(folder) if _REPEATED_FOLDER.fullmatch(one.name))]


def _files_below(folders: list[Path]) -> Iterator[Path]:
    """At most some thousand, and none behind a link."""
    count = 0
    for folder in folders:
        for place, _, names in os.walk(folder):
            for name in names:
                yield Path(place, name)
                count += 1
                if count == _MOST_FILES_INSIDE:
                    return


def _is_called_picture(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _lines_of(text_file: Path) -> list[str]:
    """Those that are not empty, with single spaces."""
    try:
        text = read_regular(text_file, MOST_CAPTION_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{text_file} is not a UTF-8 text file. Save it as UTF-8 text.") from error
    except OSError as error:
        raise DataError(
            f"The caption {text_file} cannot be read ({error.strerror}). Put a short text file "
            f"there, or none."
        ) from error
    if "\0" in text:  # UTF-16 without its mark, as a rule
        raise DataError(f"{text_file} is not a UTF-8 text file. Save it as UTF-8 text.")
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def some(names: list[str], shown: int = 3) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
