"""What the node Training Job hands out of a folder that somebody may have put there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from custom_diffusion.trainer.jobs.folder import SAMPLE_EDGE, JobFolder
from custom_diffusion.trainer.jobs.service import TrainingService
from PIL import Image
from support.hostile import concept


def test_samples_of_any_size_and_number_are_one_batch_that_fits(
    comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from custom_diffusion.host.comfyui.jobs import service as jobs

    folder = JobFolder.create(tmp_path, "cat", {"steps": 9})
    for kind in ("concepts", "samples"):
        (folder.path / kind).mkdir()
    (folder.path / "concepts" / "000000003.safetensors").write_bytes(concept())
    for step, size in ((1, (8, 8)), (2, (3, 700)), (3, (SAMPLE_EDGE, SAMPLE_EDGE))):
        Image.new("RGB", size, (step, 0, 0)).save(folder.path / "samples" / f"{step:09}.png")
    service = TrainingService(tmp_path)
    monkeypatch.setattr(jobs, "training_service", lambda: service)
    _, _, samples, state = jobs.job_results(folder.id, best=False)
    assert samples.shape == (3, SAMPLE_EDGE, SAMPLE_EDGE, 3)
    assert [round(float(each.max() * 255)) for each in samples] == [1, 2, 3]
    assert "samples" not in state
    monkeypatch.setattr(jobs, "_MOST_SAMPLES", 2)
    _, _, samples, state = jobs.job_results(folder.id, best=False)
    assert [round(float(each.max() * 255)) for each in samples] == [2, 3]
    assert state.endswith("the newest 2 of 3 samples")
