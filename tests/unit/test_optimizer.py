"""AdamW with its state in 8 bits a number: nearly the same steps, a quarter of the memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.errors import ConfigError
from custom_diffusion.trainer.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.events import CheckpointDue, Event
from custom_diffusion.trainer.learning.optimizer import (
    averaged,
    check_optimizer,
    make_optimizer,
)
from custom_diffusion.trainer.learning.schedule import check_schedule, rate_factor, set_rates
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
@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("adamw 8-bit", "bitsandbytes"),
        ("prodigy", "prodigyopt"),
        ("adamw schedule-free", "schedulefree"),
    ],
)
def test_without_the_package_the_message_says_what_to_install(name: str, package: str) -> None:
    """In a Python that does not find it."""
    script = f"""if True:
        import sys
        sys.modules["{package}"] = None
        from custom_diffusion.trainer.config import TrainConfig
        from custom_diffusion.trainer.learning.optimizer import check_optimizer
        check_optimizer(TrainConfig())
        check_optimizer(TrainConfig(optimizer="{name}"))
    """
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 1
    assert f"ConfigError: The optimizer {name!r}" in ended.stderr
    assert f"pip install {package}" in ended.stderr


def test_unknown_optimizers_are_refused() -> None:
    with pytest.raises(ConfigError, match="optimizer='sgd' is unknown"):
        TrainConfig(optimizer="sgd")  # type: ignore[arg-type]


OTHERS: dict[str, dict[str, Any]] = {
    "prodigy": {"optimizer": "prodigy"},
    "schedule-free": {"optimizer": "adamw schedule-free", "warmup_steps": 2},
    "cosine": {"schedule": "cosine", "warmup_steps": 2, "word_learning_rate": 1e-2},
}


@pytest.mark.parametrize("choice", OTHERS)
def test_a_training_goes_on_to_the_bit_whatever_it_looks_at_on_its_way(
    pipeline: StableDiffusionPipeline, tmp_path: Path, choice: str
) -> None:
    """Checkpoints, previews and measurements in between leave no trace."""
    plain = TrainConfig(
        steps=4,
        batch_size=2,
        resolution=RESOLUTION,
        learning_rate=1e-3,
        preview_every_steps=0,
        **OTHERS[choice],
    )
    looking = replace(plain, preview_every_steps=2)

    def keep(event: Event) -> None:
        if isinstance(event, CheckpointDue) and event.checkpoint.step == 2:
            write_checkpoint(event.checkpoint, tmp_path / "checkpoint.safetensors")

    def learnt(config: TrainConfig, every: int, at: Checkpoint | None) -> list[Tensor]:
        concept = train_cat(pipeline, config, every, at, lambda: False, keep)
        rows = concept.tokens[0].embeddings["clip_l"]
        return [rows, *(delta.dense() for delta in concept.deltas.values())]

    whole = learnt(plain, 0, None)
    looked = learnt(looking, 2, None)
    went_on = learnt(plain, 0, read_checkpoint(tmp_path / "checkpoint.safetensors"))
    for one, other, third in zip(whole, looked, went_on, strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)
    assert any(dense.any() for dense in whole[1:])


def test_what_schedule_free_has_learnt_is_its_average() -> None:
    """x = y + (1 - 1/β) (z - y), of the package's own state."""
    config = TrainConfig(optimizer="adamw schedule-free", learning_rate=1e-2)
    matrix, optimizer = after_steps(config, 10)
    (state,) = optimizer.state.values()
    before = matrix.clone()
    with averaged(optimizer):
        torch.testing.assert_close(matrix, before + (1 - 1 / 0.9) * (state["z"] - before))
        assert not torch.equal(matrix, before)
    assert torch.equal(matrix, before)


def test_a_rate_for_words_is_theirs_alone() -> None:
    """AdamW's first step is the rate, whatever the gradient."""
    config = TrainConfig(learning_rate=1e-3, word_learning_rate=1e-2, weight_decay=0)
    draw = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, 3, generator=draw)) for _ in range(4)]
    began = [parameter.detach().clone() for parameter in parameters]
    optimizer = make_optimizer(config, parameters, parameters[1:3])
    for parameter in parameters:
        parameter.grad = torch.randn(4, 3, generator=draw)
    optimizer.step()
    moved = [float((p.detach() - b).abs().mean()) for p, b in zip(parameters, began, strict=True)]
    assert moved == pytest.approx([1e-3, 1e-2, 1e-2, 1e-3], rel=1e-3)
    flat = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(flat, parameters, strict=True))


def test_rates_go_as_diffusers_has_them() -> None:
    from diffusers.optimization import get_cosine_schedule_with_warmup

    config = TrainConfig(steps=50, warmup_steps=9, schedule="cosine", learning_rate=1e-3)
    parameter = nn.Parameter(torch.zeros(1))
    ours = make_optimizer(config, [parameter])
    theirs = torch.optim.AdamW([parameter], lr=1e-3)
    scheduler = get_cosine_schedule_with_warmup(theirs, 9, 50)
    for step in range(50):
        set_rates(ours, config, step)
        if step >= 9:
            assert ours.param_groups[0]["lr"] == pytest.approx(scheduler.get_last_lr()[0])
        else:  # theirs begins with a step of nothing
            assert ours.param_groups[0]["lr"] == pytest.approx(1e-3 * (step + 1) / 10)
        theirs.step()
        scheduler.step()
    assert rate_factor(TrainConfig(warmup_steps=9), 20) == 1


def test_prodigy_moves_without_a_rate_of_ours() -> None:
    one, optimizer = after_steps(TrainConfig(optimizer="prodigy", learning_rate=1e-7), 30)
    other, _ = after_steps(TrainConfig(optimizer="prodigy", learning_rate=1e-2), 30)
    assert torch.equal(one, other) and optimizer.param_groups[0]["d"] > 2e-6, "it began at 1e-6"


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"warmup_steps=250 is as long as .* 250 steps"):
        check_schedule(TrainConfig(warmup_steps=250))
    with pytest.raises(ConfigError, match="'cosine' does not go with .* averages instead"):
        check_schedule(TrainConfig(schedule="cosine", optimizer="adamw schedule-free"))
    with pytest.raises(ConfigError, match="one rate for all that learns"):
        check_optimizer(TrainConfig(word_learning_rate=1e-3, optimizer="prodigy"))
