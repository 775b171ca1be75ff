"""What a concept is taught from: captioned pictures, checked before any time is spent on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops

from ...concept.errors import DataError
from ...pictures.colours import in_colours
from ...pictures.opening import read_picture, read_size

GREY = (128, 128, 128)
"""What stands for nothing: the middle of the range that the autoencoder sees."""
MOST_REPEATS = 1000


@dataclass(frozen=True)
class Picture:
    """Pixels, upright and in RGB, and where they count."""

    image: Image.Image
    mask: Image.Image | None = None
    """Of the same size, in shades: the whiter, the more; None where all of it counts."""

    def subject(self) -> Image.Image:
        """As far as the mask reaches; all of it without one."""
        box = self.mask.getbbox() if self.mask else None
        return self.image.crop(box) if box else self.image


@dataclass(frozen=True)
class CaptionedImage:
    """A picture, in memory or still on disk, its caption, and a mask where there is one."""

    source: Image.Image | Path
    caption: str
    mask: Image.Image | Path | None = None
    repeats: int = 1
    """How often it comes up for once that others do"""
    weight: float = 1.0
    """What it counts each time; 0 leaves it out"""
    choices: tuple[str, ...] = ()
    """Captions of which a training may take any; none where there is but the one"""
    trigger_added: bool = False
    """Whether the trigger word was put into what somebody has written"""

    @property
    def captions(self) -> tuple[str, ...]:
        """All that there are, at least one"""
        return self.choices or (self.caption,)

    @property
    def name(self) -> str:
        return self.file_name or "an image in memory"

    @property
    def file_name(self) -> str:
        """Empty for a picture that is no file."""
        return self.source.name if isinstance(self.source, Path) else ""

    def size(self) -> tuple[int, int]:
        """Width and height of what `open` returns, of a file without decoding its pixels."""
        return read_size(self.source) if isinstance(self.source, Path) else self.source.size

    def open(self) -> Picture:
        """Transparent parts become grey and do not count.

        Raises DataError naming a file that cannot be read or a mask that fits no pixel.
        """
        picture = _opaque(_upright(self.source))
        if self.mask is None:
            mask = picture.mask
        else:
            mask = in_colours(_upright(self.mask)).convert("L")
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


def check_readable(images: Sequence[CaptionedImage]) -> None:
    """Opens every picture; raises one DataError that names all that cannot be read."""
    for _ in open_each(images):
        pass


def open_each(images: Sequence[CaptionedImage]) -> Iterator[tuple[int, Picture]]:
    """Places and pictures, one in memory at a time, without those that cannot be read: after the
    last one DataError names them all.
    """
    broken = []
    for place, image in enumerate(images):
        try:
            picture = image.open()
        except DataError as error:
            broken.append(str(error))
            continue
        yield place, picture
        del picture
    if broken:
        raise DataError("\n".join(broken))


def _upright(source: Image.Image | Path) -> Image.Image:
    return read_picture(source) if isinstance(source, Path) else source


def _opaque(image: Image.Image) -> Picture:
    image = in_colours(image)
    if image.mode == "RGB":
        return Picture(image)
    alpha = image.getchannel("A")
    picture = image.convert("RGB")
    picture.paste(GREY, mask=ImageChops.invert(alpha))
    return Picture(picture, alpha)
