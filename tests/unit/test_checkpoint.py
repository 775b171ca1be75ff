"""A training that goes on from a checkpoint is the one that never stopped, to the bit."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import CheckpointError
from custom_diffusion.concept.file import concept_tensors
from custom_diffusion.host.diffusers.lending import borrowed_models
from custom_diffusion.trainer.checkpoint import (
    FORMAT,
    FORMAT_VERSION,
    Checkpoint,
    _digest,
    read_checkpoint,
    write_checkpoint,
)
from custom_diffusion.trainer.config import MethodName, TrainConfig
from custom_diffusion.trainer.events import CheckpointDue, Event, StepDone
from custom_diffusion.trainer.loop import train
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from support.tiny_models import RESOLUTION, cat_concept, dog_concept, random_bank, tiny_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.any_version]

STEPS = 6


def config(method: MethodName = "custom diffusion", **changes: Any) -> TrainConfig:
    settings = {"steps": STEPS, "batch_size": 4, "learning_rate": 1e-3, "resolution": RESOLUTION}
    return TrainConfig(method=method, rank=2, **{"preview_every_steps": 3, **settings, **changes})


def trained(
    pipeline: StableDiffusionPipeline, settings: TrainConfig, **options: Any
) -> tuple[Concept, list[float], dict[str, torch.Tensor]]:
    """Two concepts, one of them regularized: what was learnt, the losses, the UNet afterwards."""
    concepts = [cat_concept(3, regularization=3), dog_concept(2)]
    banks = [random_bank(concept) for concept in concepts]
    losses: list[float] = []
    listener = options.pop("on_event", lambda event: None)

    def on_event(event: Event) -> None:
        if isinstance(event, StepDone):
            losses.append(event.loss)
        listener(event)

    with borrowed_models(pipeline) as models:
        result = train(
            settings,
            concepts,
            banks,
            models.denoiser,
            models.text_encoder,
            on_event=on_event,
            **options,
        )
    return result, losses, pipeline.unet.state_dict()


def assert_same(one: Concept, other: Concept) -> None:
    ours, theirs = concept_tensors(one), concept_tensors(other)
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert one.provenance["final_losses"] == other.provenance["final_losses"]


@pytest.mark.parametrize("method", ["custom diffusion", "fine-tune all"])
def test_a_training_gone_on_with_is_the_one_that_never_stopped(
    method: MethodName, tmp_path: Path
) -> None:
    """Every method, optimizer and precision: test_half_precision.py."""
    file = tmp_path / "checkpoint.safetensors"
    whole, losses, network = trained(tiny_pipeline(), config(method))

    def keep(event: Event) -> None:
        if isinstance(event, CheckpointDue):
            write_checkpoint(event.checkpoint, file)

    steps = iter(range(100))
    part, first, _ = trained(
        tiny_pipeline(),
        config(method),
        checkpoint_every_steps=100,
        should_stop=lambda: next(steps) == 4,
        on_event=keep,
    )
    assert part.provenance["steps"] == len(first) == 4
    rest, second, network_too = trained(
        tiny_pipeline(), config(method), checkpoint=read_checkpoint(file)
    )
    assert first + second == losses
    assert_same(rest, whole)
    for name, weight in network.items():
        assert torch.equal(weight, network_too[name]), name


def test_checkpoints_come_every_so_many_steps_and_at_the_end() -> None:
    due: list[tuple[int, int]] = []

    def note(event: Event) -> None:
        if isinstance(event, CheckpointDue):
            assert event.concept is not None
            due.append((event.checkpoint.step, event.concept.provenance["steps"]))

    pipeline = tiny_pipeline()
    trained(pipeline, config(), checkpoint_every_steps=4, on_event=note)
    trained(pipeline, config(), checkpoint_every_steps=3, on_event=note)
    trained(pipeline, config(), checkpoint_every_steps=3, on_event=note, should_stop=lambda: True)
    trained(pipeline, config(), on_event=note)
    assert due == [(4, 4), (6, 6), (3, 3), (6, 6)]


def test_a_concept_that_cannot_hold_all_that_was_learnt_is_not_in_a_checkpoint() -> None:
    seen: list[Concept | None] = []

    def note(event: Event) -> None:
        if isinstance(event, CheckpointDue):
            seen.append(event.concept)

    trained(tiny_pipeline(), config("dreambooth"), checkpoint_every_steps=6, on_event=note)
    assert seen == [None]


def any_checkpoint(tmp_path: Path) -> Path:
    file = tmp_path / "checkpoint.safetensors"
    optimizer = torch.optim.AdamW(
        [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    write_checkpoint(Checkpoint.of(optimizer, [0.1, 1 / 3]), file)
    return file


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(any_checkpoint(tmp_path))
    assert checkpoint.losses == (0.1, 1 / 3)
    assert [tuple(p.shape) for p in checkpoint.parameters] == [(3,), (2, 2)]
    assert [sorted(moments) for moments in checkpoint.moments] == [
        ["exp_avg", "exp_avg_sq", "step"]
    ] * 2


def test_what_was_restored_is_not_held_a_second_time(tmp_path: Path) -> None:
    """Whoever began the run holds the checkpoint to its end, and it is as large as what learns."""
    checkpoint = read_checkpoint(any_checkpoint(tmp_path))
    parameter = weakref.ref(checkpoint.parameters[0])
    optimizer = torch.optim.AdamW(
        [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    )
    assert checkpoint.restore(optimizer) == [0.1, 1 / 3]
    assert parameter() is None and checkpoint.step == 2
    assert optimizer.param_groups[0]["params"][0].abs().min() > 0


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": "9" * 5000},
        {"parameters": "1000000000"},
        {"parameters": "-1"},
        {"losses": torch.tensor([0.5])},
        {"losses": torch.tensor([float("nan")], dtype=torch.float64)},
        {"losses": None},
        {"parameter.0": None},
        {"parameter.7": torch.ones(1)},
        {"step.²": torch.ones(1)},
    ],
    ids=str,
)
def test_a_checkpoint_that_makes_no_sense_is_refused_although_its_digest_is_right(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    file = tmp_path / "checkpoint.safetensors"
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "parameters": "1"}
    tensors = {"losses": torch.tensor([0.5], dtype=torch.float64), "parameter.0": torch.ones(2)}
    metadata.update({name: value for name, value in change.items() if isinstance(value, str)})
    tensors.update({name: value for name, value in change.items() if name not in metadata})
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, file, {**metadata, "digest": _digest(metadata, tensors)})
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors is damaged: \w+"):
        read_checkpoint(file)


def test_any_flipped_byte_and_any_missing_one_is_noticed(tmp_path: Path) -> None:
    file = any_checkpoint(tmp_path)
    content = file.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors"):
            read_checkpoint(file)
    for length in range(0, len(content), 7):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors cannot be read"):
            read_checkpoint(file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(tmp_path / "absent.safetensors")


def test_a_checkpoint_of_other_settings_is_refused() -> None:
    seen: list[Checkpoint] = []

    def note(event: Event) -> None:
        if isinstance(event, CheckpointDue):
            seen.append(event.checkpoint)

    trained(tiny_pipeline(), config("low-rank"), checkpoint_every_steps=6, on_event=note)
    with pytest.raises(CheckpointError, match=r"after step 6 holds parameters of the shapes"):
        trained(tiny_pipeline(), config(), checkpoint=seen[0])
