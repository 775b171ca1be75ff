"""Pictures that an evaluation compares with, as they are connected or chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import comfy.model_management
from PIL import Image
from torch import Tensor

from ...concept.errors import DataError
from ...concept.prompts import subject
from ...evaluation.prompts import Taught, names_of
from ...pictures.tensors import to_picture
from ...trainer.data.captioned import CaptionedImage, Picture
from ...trainer.data.folders import load_folder
from ...trainer.data.training_concept import TrainingConcept
from .paths import NO_FOLDER, input_folder


@dataclass(frozen=True)
class Pictures:
    """Pictures that are opened one by one: of a folder of `input/`, or in memory already."""

    count: int
    picture: Callable[[int], Picture]

    @staticmethod
    def of(images: Tensor | None, folder: str) -> Pictures:
        if images is not None and folder != NO_FOLDER:
            raise DataError(
                f"Both reference pictures and the folder {folder!r} were given. Disconnect the "
                f"pictures, or set the folder to {NO_FOLDER!r}."
            )
        if images is not None and len(images):
            return Pictures(len(images), lambda n: Picture(to_picture(images[n][..., :3])))
        if folder == NO_FOLDER:
            raise DataError(
                "There are no reference pictures to compare with. Connect pictures of the concept, "
                "best some it was not trained on, or choose their folder."
            )
        return Pictures.captioned(load_folder(input_folder(folder), ""))

    @staticmethod
    def captioned(images: Sequence[CaptionedImage]) -> Pictures:
        return Pictures(len(images), lambda n: images[n].open())

    def open(self, number: int) -> Image.Image:
        return self.picture(number).image

    def each(self) -> Iterator[Image.Image]:
        for number in range(self.count):
            comfy.model_management.throw_exception_if_processing_interrupted()
            yield self.open(number)

    def each_subject(self) -> Iterator[Image.Image]:
        """As far as its mask reaches, where it has one."""
        for number in range(self.count):
            comfy.model_management.throw_exception_if_processing_interrupted()
            yield self.picture(number).subject()

    def first(self, most: int) -> list[Image.Image]:
        return [self.open(number) for number in range(min(most, self.count))]


def reference_sets(
    taught: Taught,
    images: Tensor | None,
    folder: str,
    subjects: Sequence[TrainingConcept],
) -> Mapping[str, Pictures]:
    """What is compared with, by what it is called: the pictures or the folder for the first trigger
    word, or those of each subject for the word that it has.

    Raises DataError for a subject that the concept does not have, and where both are given.
    """
    names = names_of(taught)
    if not subjects:
        return {names[0]: Pictures.of(images, folder)}
    if images is not None or folder != NO_FOLDER:
        raise DataError(
            "References were given twice: as subjects, and as pictures or a folder. Disconnect the "
            f"pictures and set reference_folder to {NO_FOLDER!r}, or disconnect the subjects."
        )
    by_token = {token.name: name for token, name in zip(taught.tokens, names, strict=False)}
    found: dict[str, Pictures] = {}
    for one in subjects:
        if one.token not in by_token:
            raise DataError(
                f"The references of {subject(one.token, one.class_noun)} belong to no trigger word "
                f"of the concept, which has {', '.join(by_token) or 'none'}. Write one of these on "
                f"the Custom Diffusion Concept with the references."
            )
        if by_token[one.token] in found:
            raise DataError(
                f"Two sets of references were given for {one.token}. Put them into one folder."
            )
        found[by_token[one.token]] = Pictures.captioned(one.images)
    return {name: found[name] for name in names if name in found}
