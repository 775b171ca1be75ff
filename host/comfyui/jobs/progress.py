"""How far a training is, from the moment its node runs: one bar from 0 to 100 % and a few words.

Before there is a job the page hears of it from here; then from the job itself.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import comfy.utils
from server import PromptServer

from ....trainer.jobs.snapshot import PREPARED

EVENT = "custom_diffusion.preparing"
_TELL_EVERY_S = 0.25
_PARTS = 1000
"""Of the bar on a node, which counts whole ones"""


class NodeProgress:
    """ComfyUI's own bar on the node that is executed."""

    def __init__(self) -> None:
        self._bar = comfy.utils.ProgressBar(_PARTS)

    def show(self, progress: float, preview: Any = None) -> None:
        """`progress` 0 to 1."""
        self._bar.update_absolute(round(progress * _PARTS), _PARTS, preview)


class Preparation:
    """What a node does before its training is a job. All browsers hear of it, and of its end."""

    def __init__(self, name: str, node_id: str) -> None:
        self._bar = NodeProgress()
        server = getattr(PromptServer, "instance", None)
        prompt = getattr(server, "last_prompt_id", None)
        self._told = {"name": name, "node": node_id, "prompt": prompt}
        self._at_s = 0.0

    def __enter__(self) -> Preparation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._tell(doing="", failed=error is not None)

    def doing(self, what: str) -> None:
        """`what` is one of the page's words."""
        self._tell(doing=what, done=0, total=0, progress=0.0)

    def encoding(self, done: int, total: int) -> None:
        """So many views are encoded, of so many."""
        progress = PREPARED * done / total
        self._bar.show(progress)
        if done == total or time.monotonic() - self._at_s > _TELL_EVERY_S:
            self._tell(doing="encoding", done=done, total=total, progress=progress)

    def _tell(self, **now: Any) -> None:
        self._at_s = time.monotonic()
        server = getattr(PromptServer, "instance", None)
        if server:
            server.send_sync(EVENT, {**self._told, **now})
