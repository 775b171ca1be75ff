"""Settings of a job, in a table like that of a training: how it is kept, not what it learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..settings import Setting, setting, settings_of


@dataclass(frozen=True)
class JobSettings:
    checkpoint_every_steps: int = setting(
        50,
        "How often progress is saved, in steps. After a crash you lose at most this many: start "
        "the same training again to resume.",
        "job",
        least=1,
        most=10_000,
    )
    keep_best: int = setting(
        1,
        "How many earlier versions to keep besides the newest: the ones with the lowest validation "
        "loss, or without validation_pictures the lowest recent loss. Raise it to compare more "
        "steps.",
        "job",
        least=1,
        most=100,
    )

    def __post_init__(self) -> None:
        for name, known in JOB_SETTINGS.items():
            known.check(getattr(self, name))


JOB_SETTINGS: Mapping[str, Setting] = settings_of(JobSettings)
