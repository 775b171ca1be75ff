"""Samples that a training draws on its way, as pictures beside its output."""

from __future__ import annotations

from pathlib import Path

from ..concept.atomic import write_atomically
from ..trainer.events import PreviewDrawn
from ..trainer.jobs.folder import sample_picture


class Previews:
    """A folder `cat-samples` beside `cat.safetensors`, made when there is a first sample."""

    def __init__(self, output: Path) -> None:
        self._folder = output.with_name(f"{output.stem}-samples")

    def save(self, event: PreviewDrawn) -> Path:
        """Returns the file, which may replace that of an earlier training."""
        path = self._folder / f"step-{event.step:05d}.png"
        picture = sample_picture(event.image_hwc)
        write_atomically(path, lambda temporary: picture.save(temporary, "PNG"))
        return path
