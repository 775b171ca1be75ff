"""What a concept is taught from: captioned pictures, checked before any time is spent on them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from ..concept.errors import DataError
from ..concept.prompts import DEFAULT_TEMPLATE, check_modifier_token, subject
from ..concept.regular_files import read_regular
from .pictures import IMAGE_SUFFIXES, read_picture

MASK_ENDING = ".mask.png"
"""`cat1.mask.png` beside `cat1.jpg` says where the picture counts: in the white."""
GREY = (128, 128, 128)
"""What stands for nothing: the middle of the range that the autoencoder sees."""
MOST_CAPTION_BYTES = 64_000
MOST_REPEATS = 1000
_REPEATED_FOLDER = re.compile(r"(\d+)_(.*)")


@dataclass(frozen=True)
class Picture:
    """Pixels, upright and in RGB, and where they count."""

    image: Image.Image
    mask: Image.Image | None = None
    """Of the same size, in shades: the whiter, the more; None where all of it counts."""


@dataclass(frozen=True)
class CaptionedImage:
    """A picture, in memory or still on disk, its caption, and a mask where there is one."""

    source: Image.Image | Path
    caption: str
    mask: Image.Image | Path | None = None
    repeats: int = 1
    """How often it comes up for once that others do"""

    @property
    def name(self) -> str:
        return self.source.name if isinstance(self.source, Path) else "an image in memory"

    def open(self) -> Picture:
        """Transparent parts become grey and do not count.

        Raises DataError naming a file that cannot be read or a mask that fits no pixel.
        """
        picture = _opaque(_upright(self.source))
        if self.mask is None:
            mask = picture.mask
        else:
            mask = _upright(self.mask).convert("L")
            if mask.size != picture.image.size:
                raise DataError(
                    f"The mask of {self.name} is {mask.width} x {mask.height} pixels, the picture "
                    f"{picture.image.width} x {picture.image.height}. Give a mask of its size."
                )
            if picture.mask:
                mask = ImageChops.multiply(mask, picture.mask)
        if mask and not mask.getbbox():
            raise DataError(
                f"The mask of {self.name} is black everywhere, so nothing could be learnt from the "
                f"picture. Paint white what counts, or leave the mask out."
            )
        return Picture(picture.image, mask)


@dataclass(frozen=True)
class TrainingConcept:
    """One thing to teach: its pictures, its words, and what must not change meanwhile."""

    images: tuple[CaptionedImage, ...]
    class_noun: str
    token: str = ""
    """The new word; empty to teach the class noun itself, a category that the model lacks."""
    initializer: str = ""
    """Word whose embedding the token starts from; empty for a rare token."""
    regularization: tuple[CaptionedImage, ...] = ()
    template: str = DEFAULT_TEMPLATE
    """What is said of it; STYLE_TEMPLATE for a style, whose class noun is `art`, say."""

    @property
    def prompt(self) -> str:
        """`photo of a <new1> cat`"""
        return instance_caption(self.token, self.class_noun, self.template)

    def __post_init__(self) -> None:
        if self.token:
            check_modifier_token(self.token)
        elif self.initializer:
            raise DataError(
                f"The initializer {self.initializer!r} has no modifier token to start. Give a "
                f"token, or leave the initializer empty."
            )
        if not self.images:
            raise DataError(
                "No instance images were given. Connect 4 to 20 pictures of the concept."
            )
        if not self.class_noun.strip():
            raise DataError(
                "The class noun is empty. Write the everyday word for the thing, 'cat' for a cat."
            )
        for image in self.images:
            if self.token not in image.caption:
                raise DataError(
                    f"The caption {image.caption!r} of {image.name} does not contain the modifier "
                    f"token {self.token}, so nothing could be learnt from it. Write it like "
                    f"'{self.prompt}'."
                )
        for image in self.regularization:
            if self.token and self.token in image.caption:
                raise DataError(
                    f"The regularization caption {image.caption!r} of {image.name} contains the "
                    f"modifier token {self.token}. Regularization images show the ordinary class: "
                    f"remove the token from their captions."
                )


def instance_caption(token: str, class_noun: str, template: str = DEFAULT_TEMPLATE) -> str:
    """`photo of a <new1> cat`"""
    return template.format(subject(token, class_noun))


def load_folder(folder: Path, default_caption: str) -> tuple[CaptionedImage, ...]:
    """Every picture of a folder, by name, with the caption in the `.txt` and the mask in the
    `.mask.png` beside it where there are such files.

    Pictures in a folder inside, `10_cat`, have that many repeats, as kohya's scripts have it.
    Raises DataError when the folder is missing, holds no picture, or means too many repeats.
    """
    if not os.path.isdir(folder):
        raise DataError(f"There is no folder {folder}. Make it and put the pictures in.")
    images = [_image(path, default_caption) for path in _pictures_in(folder)]
    for inner in sorted(path for path in folder.iterdir() if os.path.isdir(path)):
        repeated = _REPEATED_FOLDER.fullmatch(inner.name)
        if repeated and (paths := _pictures_in(inner)):
            repeats = _repeats(inner, *repeated.groups())
            images += [_image(path, default_caption, repeats) for path in paths]
    if not images:
        raise DataError(
            f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)}). Put 4 to 20 pictures of "
            "the concept there."
        )
    return tuple(images)


def check_readable(images: Sequence[CaptionedImage]) -> None:
    """Opens every picture; raises one DataError that names all that cannot be read."""
    broken = []
    for image in images:
        try:
            image.open()
        except DataError as error:
            broken.append(str(error))
    if broken:
        raise DataError("\n".join(broken))


def _upright(source: Image.Image | Path) -> Image.Image:
    return read_picture(source) if isinstance(source, Path) else source


def _opaque(image: Image.Image) -> Picture:
    if image.mode.startswith("I;16"):  # Pillow would turn every shade above 255 white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return Picture(image.convert("RGB"))
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return Picture(image.convert("RGB"))
    ground = Image.new("RGB", image.size, GREY)
    ground.paste(image, mask=alpha)
    return Picture(ground, alpha)


def _image(path: Path, default_caption: str, repeats: int = 1) -> CaptionedImage:
    caption = _caption_beside(path) or default_caption
    return CaptionedImage(path, caption, _mask_beside(path), repeats)


def _repeats(folder: Path, number: str, rest: str) -> int:
    if 1 <= int(number) <= MOST_REPEATS:
        return int(number)
    raise DataError(
        f"The folder {folder} means that each of its pictures counts {int(number)} times: a number "
        f"before an underscore is that of repeats, 1 to {MOST_REPEATS}. Rename it: to "
        f"'1_{rest or 'pictures'}' to use its pictures, to '{rest or 'pictures'}' not to."
    )


def _pictures_in(folder: Path) -> list[Path]:
    """Whatever is called like a picture: what is none is refused when it is opened."""
    try:
        return sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.endswith(MASK_ENDING)
        )
    except OSError as error:
        raise DataError(
            f"The folder {folder} cannot be read ({error.strerror}). Allow it, or move it away."
        ) from error


def _mask_beside(path: Path) -> Path | None:
    mask = path.with_suffix(MASK_ENDING)
    return mask if os.path.lexists(mask) else None


def _caption_beside(path: Path) -> str:
    text_file = path.with_suffix(".txt")
    if not os.path.lexists(text_file):
        return ""
    try:
        return " ".join(read_regular(text_file, MOST_CAPTION_BYTES).decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise DataError(f"{text_file} is not a UTF-8 text file. Save it as UTF-8 text.") from error
    except OSError as error:
        raise DataError(
            f"The caption {text_file} cannot be read ({error.strerror}). Put a short text file "
            f"there, or none."
        ) from error
