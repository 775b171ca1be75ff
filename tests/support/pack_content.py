"""Jobs and concepts as trainings leave them, and as nobody should: for tests that only look."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from custom_diffusion.concept.file import write_concept
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.trainer.jobs.folder import JobFolder
from PIL import Image
from support.concepts import random_concept

GRAPH = {"1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "none"}}}
LOSSES = (0.5, float("nan"), 0.25)
SAMPLE_STEP = 2
DIRECTORY_STEP = 4
PIPE_STEP = 6
PAGE_STEP = 8
"""A sample that is a web page"""
LONG_NAME = "x" * 243
"""Of a concept whose picture could not be called `.preview.jpeg`: 255 letters is the limit"""
PAGE = b"<html><script>alert(1)</script></html>"


def write_jobs(folder: Path) -> list[str]:
    """Ids of a finished job with samples and losses, and of a paused one without a graph."""
    finished = JobFolder.create(folder, "finished", {"steps": 3, "graph": GRAPH, "node": "1"})
    finished.write_sample(torch.rand(8, 8, 3), SAMPLE_STEP)
    samples = finished.path / "samples"
    (samples / f"{DIRECTORY_STEP:09}.png").mkdir()
    os.mkfifo(samples / f"{PIPE_STEP:09}.png")
    (samples / f"{PAGE_STEP:09}.png").write_bytes(PAGE)
    lines = [{"step": n, "loss": loss, "time": None} for n, loss in enumerate(LOSSES, start=1)]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)  # as nobody writes them: NaN
    (finished.path / "metrics.jsonl").write_text(text)
    outcome = {"state": "finished", "step": 3, "notes": ["a note"]}
    (finished.path / "outcome.json").write_text(json.dumps(outcome))
    paused = JobFolder.create(folder, "paused", {"steps": 5})
    return [finished.id, paused.id]


def write_concepts(folder: Path) -> list[str]:
    """Names of a concept with a picture, of one whose picture is a web page, of a damaged one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "below").mkdir(exist_ok=True)
    concept = random_concept(family=FAMILIES["sd15"])
    for name in ("cat", "below/page"):
        write_concept(concept, folder / f"{name}.safetensors")
    shutil.copyfile(folder / "cat.safetensors", folder / f"{LONG_NAME}.safetensors")
    Image.new("RGB", (4, 4)).save(folder / "cat.jpg")
    (folder / "below" / "page.png").write_bytes(PAGE)
    (folder / "damaged.safetensors").write_bytes(_file({"__metadata__": {"format": 7}}))
    with open(os.fsencode(folder) + b"/\xff.safetensors", "wb"):
        pass
    return ["cat.safetensors", "below/page.safetensors", "damaged.safetensors"]


def _file(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text
