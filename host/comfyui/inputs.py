"""From node inputs to the pack's own types: pictures, captions, folders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import torch
from PIL import Image

from ...concept.concept import Concept
from ...concept.errors import CustomDiffusionError, DataError
from ...concept.prompts import KINDS
from ...merge.captions import read_captions
from ...merge.distance import PairDistance, concept_distances
from ...merge.merging import merge_concepts
from ...merge.projection import project_on_own_words
from ...merge.report import MergeReport
from ...pictures.tensors import to_picture, to_tensor
from ...trainer.config import TrainConfig
from ...trainer.data.advice import advice
from ...trainer.data.captioned import CaptionedImage
from ...trainer.data.contact_sheet import PictureSheet, contact_sheet
from ...trainer.data.folders import folder_advice, load_folder
from ...trainer.data.training_concept import TrainingConcept, instance_caption
from ...trainer.data.weights import with_weights
from ...trainer.data.wording import with_trigger
from .models.text import text_encoder
from .paths import NO_FOLDER, cache_folder, input_folder

BUILT_IN_CAPTIONS = "built-in"


def training_concept(
    images: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    captions: Sequence[str],
    folder: str,
    class_noun: str,
    token: str,
    regularization_folder: str,
    regularization_set: tuple[CaptionedImage, ...],
    initializer: str,
    kind: str,
    weight: float = 1.0,
    picture_weights: str = "",
) -> TrainingConcept:
    """What to teach, from connected images (b, h, w, c) in 0..1 with masks (b, h, w), one where a
    picture counts, or from a folder of `input/`.
    """
    template = KINDS[kind]
    default = instance_caption(token, class_noun, template)
    if not images and (captions or masks):
        raise DataError(
            "Captions or masks were connected without images. Connect the images too, or put a "
            ".txt and a .mask.png file beside each picture of the folder."
        )
    if images and folder != NO_FOLDER:
        raise DataError(
            f"Both images and the folder {folder!r} were given. Disconnect the images, or set the "
            f"folder to {NO_FOLDER!r}."
        )
    if images:
        instances = _from_tensors(images, masks, captions, default)
    elif folder != NO_FOLDER:
        instances = load_folder(input_folder(folder), default)
    else:
        raise DataError(
            "There are no pictures yet. Press 'Choose pictures' on the node or drop 4 to 20 on it, "
            "choose a folder, or connect images."
        )
    regularization = regularization_set
    if regularization and regularization_folder != NO_FOLDER:
        raise DataError(
            f"Both a regularization set and the folder {regularization_folder!r} were given. "
            f"Disconnect the set, or set the folder to {NO_FOLDER!r}."
        )
    if regularization_folder != NO_FOLDER:
        ordinary = instance_caption("", class_noun, template)
        regularization = load_folder(input_folder(regularization_folder), ordinary)
    return TrainingConcept(
        with_trigger(with_weights(instances, picture_weights), token, class_noun),
        *(class_noun, token, initializer, regularization, template, weight),
    )


def concept_problem(
    folder: str | None,
    class_noun: str | None,
    token: str | None,
    regularization_folder: str | None,
    has_images: bool,
) -> str:
    """What is wrong with inputs before anything runs; empty where nothing is. None stands for what
    another node will give.
    """
    stand_in = [torch.zeros(1, 1, 1, 3)] if has_images or folder is None else []
    try:
        training_concept(
            stand_in,
            masks=(),
            captions=(),
            folder=NO_FOLDER if folder is None else folder,
            class_noun="cat" if class_noun is None else class_noun,
            token="" if token is None else token,
            regularization_folder=regularization_folder or NO_FOLDER,
            regularization_set=(),
            initializer="",
            kind="thing",
        )
    except CustomDiffusionError as error:
        return str(error)
    return ""


def folders_advice(*folders: str) -> Iterator[str]:
    """What of the chosen folders of `input/` is not used, a sentence each."""
    for folder in folders:
        if folder != NO_FOLDER:
            yield from folder_advice(input_folder(folder))


def merge_in_comfyui(
    clip: Any,
    concepts: Sequence[Concept],
    strengths: Sequence[float],
    captions: str,
    relative_ridge: float,
) -> tuple[Concept, MergeReport]:
    """`merge_concepts` with a CLIP's text encoder, the user's cache folder, and progress on the
    node.
    """
    progress = comfy.utils.ProgressBar(100)
    return merge_concepts(
        concepts,
        text_encoder(clip),
        strengths=strengths,
        captions=chosen_captions(captions),
        relative_ridge=relative_ridge,
        cache_folder=cache_folder(),
        on_progress=lambda fraction: progress.update_absolute(int(100 * fraction), 100),
    )


def distances_in_comfyui(
    clip: Any, concepts: Sequence[Concept], captions: str
) -> list[PairDistance]:
    """`concept_distances` with a CLIP's text encoder and the user's cache folder."""
    progress = comfy.utils.ProgressBar(100)
    return concept_distances(
        concepts,
        text_encoder(clip),
        captions=chosen_captions(captions),
        cache_folder=cache_folder(),
        on_progress=lambda fraction: progress.update_absolute(int(100 * fraction), 100),
    )


def project_in_comfyui(clip: Any, concept: Concept) -> tuple[Concept, MergeReport]:
    """`project_on_own_words` with a CLIP's text encoder and the user's cache folder."""
    progress = comfy.utils.ProgressBar(100)
    return project_on_own_words(
        concept,
        text_encoder(clip),
        cache_folder=cache_folder(),
        on_progress=lambda fraction: progress.update_absolute(int(100 * fraction), 100),
    )


def chosen_captions(name: str) -> list[str] | None:
    """Of a file in `input/`; None for our own."""
    return None if name == BUILT_IN_CAPTIONS else read_captions(input_folder(name))


def caption_files() -> list[str]:
    """Text files in `input/`, for a drop-down; first our own captions."""
    root = Path(folder_paths.get_input_directory())
    return [BUILT_IN_CAPTIONS, *sorted(path.name for path in root.glob("*.txt"))]


def captions_fingerprint(captions: str) -> str:
    """Changes when the user's caption file does."""
    return captions if captions == BUILT_IN_CAPTIONS else file_fingerprint(input_folder(captions))


def file_fingerprint(path: Path) -> str:
    """Changes when the file does, or when it comes or goes."""
    try:
        status = path.stat()
    except OSError as error:
        return f"{path}:{error.strerror};"
    return f"{path}:{status.st_size}:{status.st_mtime_ns};"


def folder_fingerprint(*folders: Any) -> str:
    """Changes when a file in one of the folders does, or in a folder directly inside, where
    `10_cat` may be. Values arrive in lists from list inputs.
    """
    names = [name[0] if isinstance(name, list) else name for name in folders]
    chosen = [input_folder(name) for name in names if name and name != NO_FOLDER]
    files = [file for folder in chosen for file in _files_of(folder)]
    return "".join(file_fingerprint(file) for file in files)


def _files_of(folder: Path) -> list[Path]:
    """Of it and of the folders inside it; not deeper, where links may lead anywhere."""
    inside = _listed(folder)
    return [*inside, *(file for path in inside if path.is_dir() for file in _listed(path))]


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # the node that reads it says what is wrong
        return []


def draw_contact_sheet(
    concept: TrainingConcept, config: TrainConfig, together: TrainingConcept | None = None
) -> torch.Tensor:
    """`contact_sheet` as an IMAGE (1, h, w, 3)."""
    return to_tensor(contact_sheet(concept, config, together))[None]


def look_through(concept: TrainingConcept) -> tuple[list[str], torch.Tensor]:
    """`advice` on the pictures, and all of them as an IMAGE (1, h, w, 3); each is opened once."""
    sheet = PictureSheet(concept)
    found = list(advice(concept, sheet.add))
    return found, to_tensor(sheet.draw())[None]


def _from_tensors(
    images: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    captions: Sequence[str],
    default: str,
) -> tuple[CaptionedImage, ...]:
    pictures = [picture[..., :3] for batch in images for picture in batch]
    shades = [mask for batch in masks for mask in batch]
    for name, count in (("captions", len(captions)), ("masks", len(shades))):
        if count and count != len(pictures):
            raise DataError(
                f"{count} {name} were given for {len(pictures)} pictures. Give one for each, "
                "or none."
            )
    # ComfyUI's loader of folders leaves a caption empty where there is no .txt file.
    texts = [text.strip() or default for text in captions or [""] * len(pictures)]
    found: dict[tuple[object, ...], CaptionedImage] = {}
    for picture, text, mask in zip(pictures, texts, shades or [None] * len(pictures), strict=True):
        lines = tuple(line.strip() for line in text.splitlines() if line.strip())
        shade = None if mask is None else to_picture(mask)
        choices = lines if len(lines) > 1 else ()
        one = CaptionedImage(to_picture(picture), text, shade, choices=choices)
        # ComfyUI's loader of folders gives the pictures of `10_cat` ten times.
        key = (text, _pixels(one.source), _pixels(one.mask))
        found[key] = replace(found[key], repeats=found[key].repeats + 1) if key in found else one
    return tuple(found.values())


def _pixels(image: Image.Image | Path | None) -> object:
    """Equal for equal pictures."""
    assert not isinstance(image, Path)
    return image and (image.size, hashlib.sha256(image.tobytes()).digest())
