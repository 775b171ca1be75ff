"""Trainings in several processes, as torchrun starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from custom_diffusion.cli import main
from custom_diffusion.concept.errors import ConfigError
from custom_diffusion.concept.file import read_concept
from custom_diffusion.trainer.economy.processes import Replica
from safetensors.torch import load_file
from support.graphs import draw_pictures
from support.tiny_models import tiny_pipeline
from support.tiny_training import assert_same_but_for_rounding

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LONG_S = 120.0


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A training without its length and output. A batch of five is not the same for both."""
    folder = tmp_path_factory.mktemp("given")
    tiny_pipeline().save_pretrained(folder / "model")
    for name in ("cat", "others", "mug"):
        draw_pictures(folder / name)
    images, others = [str(folder / "cat"), str(folder / "mug")], str(folder / "others")
    command = ["train", "--model", str(folder / "model"), "--images", *images]
    command += ["--class-noun", "cat", "mug", "--regularization", others, others]
    return [*command, "--batch-size", "5", "--resolution", "64", "--device", "cpu"]


def torchrun(command: list[str], folder: Path, *options: str) -> subprocess.Popen[bytes]:
    package = folder / "package"
    package.mkdir(exist_ok=True)
    if not (package / "custom_diffusion").exists():
        (package / "custom_diffusion").symlink_to(ROOT, target_is_directory=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    launcher += ["--nproc-per-node=2", "--monitor-interval=0.1", *options]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "custom_diffusion", *command],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(package),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # docs/cluster.md says why
        },
    )


def test_two_processes_learn_what_one_does(training: list[str], tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    steps = ["--steps", "3", "--output"]
    assert main([*training, *steps, str(one)]) == 0
    assert torchrun([*training, *steps, str(two)], tmp_path).wait(LONG_S) == 0
    assert_same_but_for_rounding(read_concept(one), read_concept(two))


@pytest.mark.any_version
def test_a_process_that_dies_is_started_again_and_the_training_goes_on(
    training: list[str], tmp_path: Path
) -> None:
    command = [*training, "--steps", "30", "--output"]
    killed, whole = tmp_path / "killed.safetensors", tmp_path / "whole.safetensors"
    as_job = [*command, str(killed), "--jobs", str(tmp_path / "jobs")]
    as_job += ["--checkpoint-every-steps", "10"]
    running = torchrun(as_job, tmp_path, "--max-restarts=2")
    checkpoints = "jobs/*/checkpoints/000000010.safetensors"
    end = time.monotonic() + LONG_S
    while not list(tmp_path.glob(checkpoints)):
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    os.kill(workers(running)[-1], signal.SIGKILL)
    assert running.wait(LONG_S) == 0
    (metrics,) = tmp_path.glob("jobs/*/metrics.jsonl")
    assert len(metrics.read_text().splitlines()) == 30
    assert torchrun([*command, str(whole)], tmp_path).wait(LONG_S) == 0
    ours, theirs = load_file(killed), load_file(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def workers(torchrun: subprocess.Popen[bytes]) -> list[int]:
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    return [int(child) for child in children]


def test_a_process_without_a_picture_is_refused() -> None:
    Replica(0, 2).check(2)
    with pytest.raises(ConfigError, match="batch_size=1 gives 2 processes"):
        Replica(0, 2).check(1)
