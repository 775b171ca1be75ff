"""What a host asks the trainer for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..concept.concept import Concept
from .config import TrainConfig
from .data.training_concept import TrainingConcept


@dataclass(frozen=True)
class TrainingRequest:
    """What is to be taught, and how."""

    config: TrainConfig
    concepts: Sequence[TrainingConcept]
    """Taught together, into one file"""
    earlier: Concept | None = None
    """A concept of the same model to go on from"""
