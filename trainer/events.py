"""What a training run reports while it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..concept.concept import Concept
from .checkpoint import Checkpoint


@dataclass(frozen=True)
class StepDone:
    """One optimiser step: how many are done, the loss before it, and where it was measured the
    loss after it on pictures that are kept back.
    """

    step: int
    loss: float
    validation: float | None = None


@dataclass(frozen=True)
class WordsMoved:
    """How far the embedding of each modifier token is from where it began, over its length then."""

    drift: Mapping[str, float]


@dataclass(frozen=True)
class PreviewBegun:
    """A sample is drawn now, which takes as long as some steps."""

    step: int


@dataclass(frozen=True)
class PreviewDrawn:
    """A sample of the model as it is, (h, w, 3) in 0..1, on the CPU."""

    step: int
    image_hwc: Tensor


@dataclass(frozen=True)
class MemoryShort:
    """Memory ran out: the step is computed again, and from now on with less."""

    step: int
    micro_batch_size: int
    gradient_checkpointing: bool

    def text(self) -> str:
        recomputed = ", with gradient checkpointing" if self.gradient_checkpointing else ""
        return (
            f"memory ran out at step {self.step}: from now on {self.micro_batch_size} of the "
            f"pictures at once{recomputed}; slower, the same steps"
        )


@dataclass(frozen=True)
class RegularizationLeftOut:
    """Images that were given and not needed."""

    images: int

    def text(self) -> str:
        return (
            f"{self.images} regularization pictures were not used: this training changes nothing "
            f"but the concept's own words, so it needs none"
        )


@dataclass(frozen=True)
class Bucketed:
    """The pictures of a run have several sizes, so they are not all seen in one step."""

    pictures: Mapping[tuple[int, int], int]
    """How many there are of each size"""
    fewer: Sequence[tuple[int, int]]
    """Sizes of which there are fewer than a step takes"""

    def text(self) -> str:
        sizes = ", ".join(
            f"{count} of {width} x {height}" for (width, height), count in self.pictures.items()
        )
        said = f"pictures keep their shapes: {sizes}; a step sees those of one size"
        if self.fewer:
            names = ", ".join(f"{width} x {height}" for width, height in self.fewer)
            said += f". Where they are fewer than it takes ({names}) it sees several views of each"
        return said


@dataclass(frozen=True)
class WordsAlike:
    """Two words of what the run goes on from have the same vectors."""

    one: str
    other: str

    def text(self) -> str:
        return (
            f"{self.one} and {self.other} of the concept to extend are the same to the text "
            f"encoder, so a prompt cannot tell them apart: train one of them again under a new name"
        )


@dataclass(frozen=True)
class NoLongerBetter:
    """The validation loss has been flat or rising for as long as it may."""

    step: int
    best_step: int
    loss: float
    """The lowest, at `best_step`"""
    stops: bool
    """Whether the run ends with what it had learnt at `best_step`"""

    def text(self) -> str:
        lowest = f"it was lowest at step {self.best_step} ({self.loss:.4g})"
        if self.stops:
            return (
                f"the validation loss stopped falling: the training ended at step {self.step} and "
                f"keeps what it had learnt at step {self.best_step}, because {lowest}"
            )
        return (
            f"the validation loss has stopped falling by step {self.step}: {lowest}. More steps "
            f"are unlikely to help: stop the training, and compare its steps"
        )


Notice = MemoryShort | RegularizationLeftOut | Bucketed | WordsAlike | NoLongerBetter
"""What the user is told in words"""


@dataclass(frozen=True)
class CheckpointDue:
    """What the run goes on from, and what it has learnt so far.

    The checkpoint's tensors are the run's own: to keep it, write it before the listener returns.
    """

    checkpoint: Checkpoint
    concept: Concept | None
    """None where a concept cannot hold all that was learnt"""


Event = StepDone | WordsMoved | PreviewBegun | PreviewDrawn | Notice | CheckpointDue
