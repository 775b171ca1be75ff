"""What ComfyUI executes at this moment, as far as trainings have to make room for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from server import PromptServer


class _Waiting:
    """How many nodes wait for a job at this moment: the prompt they are in makes no room for it."""

    count = 0

    @contextmanager
    def one_more(self) -> Iterator[None]:
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1


waiting_nodes = _Waiting()


def prompt_is_running() -> bool:
    """Whether ComfyUI executes a prompt that does not itself wait for a training."""
    server = getattr(PromptServer, "instance", None)
    return bool(server and server.prompt_queue.currently_running) and not waiting_nodes.count


def prompts_begun() -> int:
    """How many there were since ComfyUI's start."""
    server = getattr(PromptServer, "instance", None)
    return int(server.prompt_queue.task_counter) if server else 0


def running_graph() -> Mapping[str, Any]:
    """The nodes of the prompt that is executed, as it was sent; none where there is no prompt."""
    server = getattr(PromptServer, "instance", None)
    running = list(server.prompt_queue.currently_running.values()) if server else []
    return running[0][2] if running else {}
