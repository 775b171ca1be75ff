"""The errors users can meet. Each message says what was given, what was needed and what to do."""

from pathlib import Path

from .plain import plain_text

_LONGEST = 4000
"""Characters of a message; it may name what a stranger's file holds"""


class CustomDiffusionError(Exception):
    """Base of every error that this pack raises on purpose."""

    def __init__(self, message: str = "") -> None:
        super().__init__(plain_text(message, _LONGEST))


class ConceptFileError(CustomDiffusionError):
    """A concept file cannot be read or written."""


class UnreadableFileError(ConceptFileError):
    """A file of weights cannot be opened, or is none."""

    def __init__(self, path: Path, reason: str, remedy: str) -> None:
        super().__init__(f"{path.name} is not a readable concept file: {reason}. {remedy}.")
        self.reason = reason


class OtherFileError(ConceptFileError):
    """A file is no concept of this pack; it may be another tool's, which can be imported."""


class UnknownConceptError(ConceptFileError):
    """There is no concept of that name, or nothing of what was asked for belongs to it."""


class IncompatibleModelError(CustomDiffusionError):
    """A concept, a model and a text encoder do not belong together."""


class TokenError(CustomDiffusionError):
    """A modifier token is malformed, already a word, or used twice."""


class DataError(CustomDiffusionError):
    """Training images, captions or folders cannot be used."""


class UnknownPictureError(DataError):
    """There is no picture of this name in the folder."""


class ConfigError(CustomDiffusionError):
    """Settings contradict each other or lie outside their range."""


class MergeError(CustomDiffusionError):
    """Concepts cannot be merged as asked."""


class TrainingError(CustomDiffusionError):
    """A training run cannot go on."""


class ModelsGoneError(TrainingError):
    """The models of a training that waited for its turn are not loaded any more."""


class CheckpointError(CustomDiffusionError):
    """A checkpoint of a training cannot be used."""


class JobError(CustomDiffusionError):
    """A training job cannot be found, or cannot do what is asked of it now."""


class UnknownJobError(JobError):
    """There is no training job of that id."""
