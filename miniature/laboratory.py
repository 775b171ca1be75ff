"""Experiments on the miniature: teach concepts with the real trainer, draw, and have it judged."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..composition.routing import Route
from ..concept.concept import Concept
from ..concept.delta import DenseDelta
from ..concept.prompts import subject
from ..concept.text import TextEncoder
from ..host.diffusers.lending import DiffusersModels, borrowed_models, text_encoder
from ..host.diffusers.sampling import sample
from ..pictures.tensors import to_chw, to_hwc, to_picture
from ..trainer.config import TrainConfig
from ..trainer.data.captioned import CaptionedImage
from ..trainer.data.training_concept import TrainingConcept
from ..trainer.request import TrainingRequest
from ..trainer.teach import teach
from .concepts import (
    REGULARIZATION_IMAGES,
    class_pictures,
    concept_look,
    training_concept,
)
from .judge import (
    Facts,
    bleeds,
    block_kernel_distance,
    both_present,
    image_alignment,
    text_alignment,
)
from .model import GUIDANCE, PICTURE_EDGE, SAMPLING_STEPS, miniature_pipeline
from .recognizer import Recognizer, Seen, load_recognizer
from .world import SHAPES, Look, class_caption

PICTURES_A_SEED = 1000  # more than are ever drawn with one seed
_SINGLE_PROMPTS = (
    "photo of a {0}",
    "a {0} on snow",
    "photo of a {0} at night",
    "photo of a {0} on the left",
    "picture of a {0} at the top in fog",
    "photo of a {0} and a red {1}",
    "a {0} beside a blue {1}",
    "photo of a {0} above a {1}",
)
_PAIR_PROMPTS = (
    "photo of a {0} and a {1}",
    "photo of a {1} and a {0}",
    "a {0} beside a {1}",
    "photo of a {0} to the left of a {1}",
    "picture of a {1} to the left of a {0}",
    "photo of a {0} above a {1}",
    "a {1} and a {0} on snow",
    "photo of a {0} beside a {1} at night",
)


@dataclass(frozen=True)
class Subject:
    """A concept to be taught: its look, its token and the pictures that the user brings."""

    look: Look
    token: str
    training: TrainingConcept

    @property
    def words(self) -> str:
        return subject(self.token, self.look.shape)


@dataclass(frozen=True)
class Score:
    """Means over the pictures of one experiment; the last two of pairs only."""

    text_alignment: float
    image_alignment: float
    drift: float
    """1000 times the KID of the bare class, the median of blocks"""
    class_alignment: float
    """Image alignment of pictures of the bare class: what has leaked from the token"""
    both_present: float | None = None
    bleed: float | None = None


class Laboratory:
    """The miniature, its judge, and the experiments of the paper."""

    def __init__(self, pictures_per_prompt: int = 3, class_pictures: int = 48) -> None:
        self.pictures_per_prompt, self.class_pictures = pictures_per_prompt, class_pictures
        self.pipeline = miniature_pipeline()
        self._reference: dict[str, Tensor] = {}

    @cached_property
    def encoder(self) -> TextEncoder:
        return text_encoder(self.pipeline)

    @cached_property
    def recognizer(self) -> Recognizer:
        return load_recognizer()

    def teach(
        self,
        subjects: Sequence[Subject],
        config: TrainConfig,
        after: Concept | None = None,
    ) -> Concept:
        """Teaches the subjects together, or on top of what was learnt before."""
        with borrowed_models(self.pipeline) as models:
            return _train(subjects, config, models, after)

    def teach_whole_network(self, one: Subject, config: TrainConfig) -> tuple[Any, Concept]:
        """By a method that changes more than a concept holds: returns its own pipeline, too."""
        parts = {**self.pipeline.components, "unet": copy.deepcopy(self.pipeline.unet)}
        pipeline = type(self.pipeline)(**parts, requires_safety_checker=False)
        with borrowed_models(pipeline) as models:
            return pipeline, _train([one], config, models)

    def generated_class(self, shape: str, seed: int) -> tuple[CaptionedImage, ...]:
        """A regularization set drawn by the model itself."""
        caption = class_caption(shape)
        drawn = self.draw([caption] * (REGULARIZATION_IMAGES // 2), None, seed)
        pictures = map(to_picture, to_hwc(drawn))
        return tuple(CaptionedImage(picture, caption) for picture in pictures)

    def draw(
        self,
        prompts: Sequence[str],
        concept: Concept | None,
        seed: int,
        pipeline: Any = None,
        routed: Sequence[Concept] = (),
    ) -> Tensor:
        """Pictures (b, 3, h, w) in 0..1."""
        images_bhwc = sample(
            pipeline or self.pipeline,
            prompts,
            concept,
            routes=[Route(one) for one in routed],
            resolution=PICTURE_EDGE,
            seeds=range(PICTURES_A_SEED * seed, PICTURES_A_SEED * seed + len(prompts)),
            steps=SAMPLING_STEPS,
            guidance=GUIDANCE,
        )
        return to_chw(images_bhwc)

    def score(
        self,
        subjects: Sequence[Subject],
        concept: Concept | None,
        seed: int,
        pipeline: Any = None,
        routed: Sequence[Concept] = (),
    ) -> Score:
        """Draws the prompts of one concept or of a pair, and the bare classes, with a concept in
        the weights or with several routed.
        """
        taught = concept is not None or bool(routed)
        prompts, facts = evaluation_prompts(subjects, self.pictures_per_prompt, taught)
        seen = self.recognizer.look(self.draw(prompts, concept, seed, pipeline, routed))
        looks = [one.look for one in subjects]
        likeness = torch.stack([image_alignment(seen, look) for look in looks])
        drift, class_alignment = self.class_drift(subjects, concept, seed, pipeline, routed)
        return Score(
            text_alignment=float(text_alignment(seen, facts).mean()),
            image_alignment=float(likeness.mean()),
            drift=drift,
            class_alignment=class_alignment,
            both_present=_rate(both_present(seen, looks)) if len(looks) > 1 else None,
            bleed=_rate(bleeds(seen, looks)) if len(looks) > 1 else None,
        )

    def class_drift(
        self,
        subjects: Sequence[Subject],
        concept: Concept | None,
        seed: int,
        pipeline: Any = None,
        routed: Sequence[Concept] = (),
    ) -> tuple[float, float]:
        """Drift of the bare classes, and how much they look like the concepts."""
        drifts, leaks = [], []
        for look in (one.look for one in subjects):
            captions = [class_caption(look.shape)] * (self.class_pictures // len(subjects))
            plain = self.recognizer.look(self.draw(captions, concept, seed + 1, pipeline, routed))
            reference = self._class_features(look.shape)
            drifts.append(1000 * block_kernel_distance(plain.features, reference))
            leaks.append(float(image_alignment(plain, look).mean()))
        return sum(drifts) / len(drifts), sum(leaks) / len(leaks)

    def likeness(self, one: Subject, concept: Concept, seed: int) -> float:
        """Image alignment of a concept by itself."""
        prompts, _ = evaluation_prompts([one], self.pictures_per_prompt)
        seen = self.recognizer.look(self.draw(prompts, concept, seed))
        return float(image_alignment(seen, one.look).mean())

    def _class_features(self, shape: str) -> Tensor:
        """Of pictures of the world that nothing else has seen."""
        if shape not in self._reference:
            held_out = class_pictures(shape, 2 * REGULARIZATION_IMAGES, seed=-1)
            self._reference[shape] = look_at(self.recognizer, held_out).features
        return self._reference[shape]


def pair_of_subjects(number: int, seed: int) -> tuple[Subject, Subject]:
    """Concepts 2n and 2n + 1 with pictures to learn from and pictures of their classes."""
    one, two = (subject_of(concept_look(2 * number + i), f"<new{i + 1}>", seed) for i in range(2))
    return one, two


def subject_of(look: Look, token: str, seed: int) -> Subject:
    others = class_pictures(look.shape, REGULARIZATION_IMAGES, seed)
    return Subject(look, token, training_concept(look, token, seed, others))


def evaluation_prompts(
    subjects: Sequence[Subject], repeats: int, tokens: bool = True
) -> tuple[list[str], list[Facts]]:
    """Prompts, and what a picture of each should show."""
    shapes = [one.look.shape for one in subjects]
    names = [one.words if tokens else one.look.shape for one in subjects]
    templates = _PAIR_PROMPTS
    if len(subjects) == 1:  # also beside something that is no concept
        other = SHAPES[(SHAPES.index(shapes[0]) + 2) % len(SHAPES)]
        shapes, names, templates = [*shapes, other], [*names, other], _SINGLE_PROMPTS
    prompts = [template.format(*names) for template in templates for _ in range(repeats)]
    facts = [Facts.of(template.format(*shapes)) for template in templates for _ in range(repeats)]
    return prompts, facts


def added(concepts: Sequence[Concept]) -> Concept:
    """The plain sum of what concepts change, with the words of all."""
    first = concepts[0]
    layers = {layer for concept in concepts for layer in concept.deltas}
    sums = {
        layer: sum(c.deltas[layer].dense() for c in concepts if layer in c.deltas)
        for layer in layers
    }
    return replace(
        first,
        deltas={layer: DenseDelta(torch.as_tensor(total)) for layer, total in sums.items()},
        tokens=tuple(token for concept in concepts for token in concept.tokens),
        constraint_prompts=tuple(p for concept in concepts for p in concept.constraint_prompts),
    )


def look_at(recognizer: Recognizer, images: Sequence[CaptionedImage]) -> Seen:
    from ..trainer.data.augmentation import whole_view

    frame = (PICTURE_EDGE, PICTURE_EDGE)
    pictures = [whole_view(image.open(), frame).image_chw for image in images]
    return recognizer.look(torch.stack(pictures) / 2 + 0.5)


def _train(
    subjects: Sequence[Subject],
    config: TrainConfig,
    models: DiffusersModels,
    earlier: Concept | None = None,
) -> Concept:
    request = TrainingRequest(config, [one.training for one in subjects], earlier)
    return teach(request, models.denoiser, models.text_encoder, models.latent_encoder)


def _rate(flags: Tensor) -> float:
    return float(flags.float().mean())
