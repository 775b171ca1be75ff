"""What becomes of a job when somebody wishes something of it: one table, and what stands meanwhile.

Nobody works on a job that is queued, paused or over: a wish changes its state at once. One that is
at work keeps its state, and the wish stands until the loop is left; what was wished last, while it
was being left, is then granted as for a paused job. So no wish is lost, whenever it comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from .snapshot import ENDED, JobState


class Wish(Enum):
    GO_ON = "go on"
    PAUSE = "pause"
    STOP = "stop"


AT_WORK = (JobState.PREPARING, JobState.RUNNING)

NEXT_STATE: Mapping[tuple[JobState, Wish], JobState] = {
    (JobState.QUEUED, Wish.GO_ON): JobState.QUEUED,
    (JobState.QUEUED, Wish.PAUSE): JobState.PAUSED,
    (JobState.QUEUED, Wish.STOP): JobState.QUEUED,  # its turn saves what was learnt
    (JobState.PAUSED, Wish.GO_ON): JobState.QUEUED,
    (JobState.PAUSED, Wish.PAUSE): JobState.PAUSED,
    (JobState.PAUSED, Wish.STOP): JobState.QUEUED,
    **{(state, wish): state for state in AT_WORK for wish in Wish},
    **{(state, Wish.GO_ON): JobState.QUEUED for state in ENDED},
    **{(state, Wish.STOP): state for state in ENDED},
}
"""Where there is nothing, the wish is refused: what is over cannot be paused."""

STANDING: Mapping[tuple[Wish | None, Wish], Wish | None] = {
    (None, Wish.GO_ON): None,
    (None, Wish.PAUSE): Wish.PAUSE,
    (None, Wish.STOP): Wish.STOP,
    (Wish.PAUSE, Wish.GO_ON): Wish.GO_ON,  # the loop may have been left already
    (Wish.PAUSE, Wish.PAUSE): Wish.PAUSE,
    (Wish.PAUSE, Wish.STOP): Wish.STOP,
    (Wish.GO_ON, Wish.GO_ON): Wish.GO_ON,
    (Wish.GO_ON, Wish.PAUSE): Wish.PAUSE,
    (Wish.GO_ON, Wish.STOP): Wish.STOP,
    # A stop is final, because somebody may wait for the end: nothing takes it back.
    (Wish.STOP, Wish.PAUSE): Wish.STOP,
    (Wish.STOP, Wish.STOP): Wish.STOP,
}
"""What a job at work is to do, from what it was to do and what is wished now. Where there is
nothing, the wish is refused."""


def next_state(state: JobState, wish: Wish, can_be_saved: bool) -> JobState:
    """The table's, but that a stop ends at once what has nothing to save, or no models to save it
    with. Raises KeyError where the wish is refused.
    """
    after = NEXT_STATE[state, wish]
    ends = wish is Wish.STOP and after is JobState.QUEUED and not can_be_saved
    return JobState.STOPPED if ends else after
