"""AdamW with its state in 8 bits a number: nearly the same steps, a quarter of the memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from custom_diffusion.concept.errors import ConfigError
from custom_diffusion.trainer.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.events import CheckpointDue, Event
from custom_diffusion.trainer.learning.optimizer import make_optimizer
from diffusers import StableDiffusionPipeline
from support.tiny_models import RESOLUTION, tiny_pipeline
from support.tiny_training import train_cat
from torch import Tensor, nn

STEPS = 6
EIGHT_BIT = TrainConfig(
    optimizer="adamw 8-bit",
    steps=STEPS,
    batch_size=2,
    resolution=RESOLUTION,
    learning_rate=1e-3,
    preview_every_steps=0,
)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return tiny_pipeline()


def after_steps(config: TrainConfig, steps: int) -> tuple[Tensor, torch.optim.Optimizer]:
    """A matrix that has followed gradients of a noisy bowl."""
    draw = torch.Generator().manual_seed(0)
    matrix = nn.Parameter(torch.randn(128, 96, generator=draw))
    optimizer = make_optimizer(config, [matrix])
    for _ in range(steps):
        matrix.grad = matrix.detach() + torch.randn(128, 96, generator=draw)
        optimizer.step()
    return matrix.detach(), optimizer


def test_eight_bits_make_nearly_the_same_steps() -> None:
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1}
    began, _ = after_steps(TrainConfig(**settings), 0)
    wanted, whole = after_steps(TrainConfig(**settings), 50)
    found, small = after_steps(TrainConfig(**settings, optimizer="adamw 8-bit"), 50)
    assert (found - wanted).norm() < 0.02 * (wanted - began).norm()

    def size(optimizer: torch.optim.Optimizer) -> int:
        (state,) = optimizer.state.values()
        return sum(value.nbytes for value in state.values() if isinstance(value, Tensor))

    assert size(small) < 0.3 * size(whole)


def test_a_training_goes_on_to_the_bit(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    def keep(event: Event) -> None:
        if isinstance(event, CheckpointDue) and event.checkpoint.step == 3:
            write_checkpoint(event.checkpoint, tmp_path / "checkpoint.safetensors")

    def learnt(checkpoint: Checkpoint | None) -> dict[str, Tensor]:
        concept = train_cat(pipeline, EIGHT_BIT, 3, checkpoint, lambda: False, keep)
        return {layer: delta.dense() for layer, delta in concept.deltas.items()}

    whole = learnt(None)
    went_on = learnt(read_checkpoint(tmp_path / "checkpoint.safetensors"))
    assert all(torch.equal(went_on[layer], dense) for layer, dense in whole.items())
    assert any(dense.any() for dense in whole.values())


@pytest.mark.slow
def test_without_the_package_the_message_says_what_to_install() -> None:
    """In a Python that does not find bitsandbytes."""
    script = """if True:
        import sys
        sys.modules["bitsandbytes"] = None
        from custom_diffusion.trainer.config import TrainConfig
        from custom_diffusion.trainer.learning.optimizer import check_optimizer
        check_optimizer(TrainConfig())
        check_optimizer(TrainConfig(optimizer="adamw 8-bit"))
    """
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "ConfigError: The optimizer 'adamw 8-bit'" in ended.stderr
    assert "pip install bitsandbytes" in ended.stderr


def test_unknown_optimizers_are_refused() -> None:
    with pytest.raises(ConfigError, match="optimizer='sgd' is unknown"):
        TrainConfig(optimizer="sgd")  # type: ignore[arg-type]
