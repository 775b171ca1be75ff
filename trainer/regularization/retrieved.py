"""A regularization set from a collection, as Custom Diffusion's authors chose theirs from LAION.

Kumari et al. (§3.1) take 200 pictures whose captions have a similarity above 0.85 with the class
prompt in CLIP's text space. The service that their script asks has been closed since.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...concept.atomic import write_bytes_atomically, write_text_atomically
from ...concept.errors import DataError
from ...pictures.kept import claim_folder, settings_hash
from ...pictures.opening import PictureError, decode_picture
from ..data.captioned import CaptionedImage
from .caption_index import CaptionIndex, CaptionMatch, Embed

COUNT, LEAST_SIMILARITY = 200, 0.85
_SPARE = 2  # times as many as wanted are looked at: crawled collections hold broken files


@dataclass(frozen=True)
class Retrieved:
    """A regularization set, how near its last caption is, and how many pictures were broken."""

    images: tuple[CaptionedImage, ...]
    least_similarity: float
    broken: int


def retrieve(
    index: CaptionIndex,
    embed: Embed,
    prompt: str,
    folder: Path,
    count: int = COUNT,
    least: float = LEAST_SIMILARITY,
) -> Retrieved:
    """Copies the pictures whose captions are nearest to `prompt` to `folder`, captions beside them.

    They are fewer than `count` where no more captions are near enough. Pictures that cannot be
    opened are passed over, and counted. Raises DataError where no caption is near enough, or where
    `folder` holds something else.
    """
    (query,) = embed([prompt])
    found = index.search(query, _SPARE * count, least)
    places = [f"{one.part.path} {one.entry.location}" for one in found]
    claim_folder(
        folder, {"prompt": prompt, "count": count, "pictures": settings_hash({"found": places})}
    )
    images: list[CaptionedImage] = []
    chosen: list[CaptionMatch] = []
    broken: list[PictureError] = []
    for one in found:
        if len(images) == count:
            break
        try:
            content = one.part.read(one.entry)
            decode_picture(content, f"{one.entry.location} of {one.part.path}")
        except PictureError as error:
            broken.append(error)
            continue
        suffix = PurePosixPath(one.entry.location).suffix.lower()
        path = folder / f"{len(images):05}{suffix}"
        write_text_atomically(path.with_suffix(".txt"), one.entry.caption)
        write_bytes_atomically(path, content)
        images.append(CaptionedImage(path, one.entry.caption))
        chosen.append(one)
    if not images:
        raise DataError(
            f"{len(broken)} captions are near enough to {prompt!r}, and none of their pictures can "
            f"be opened. The first: {broken[0]} Download the collection again, or ask for less."
        )
    return Retrieved(tuple(images), chosen[-1].similarity, len(broken))
