"""Steps in less memory: in parts, with checkpointing, and after memory ran out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.host.diffusers.lending import DiffusersModels
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.economy.backward import recomputed
from custom_diffusion.trainer.events import Event, MemoryShort, StepDone
from custom_diffusion.trainer.loop import train
from support.kept import kept_bytes
from support.tiny_models import RESOLUTION, cat_concept, random_bank
from support.tiny_training import assert_same_but_for_rounding
from torch import Tensor

pytestmark = pytest.mark.slow


def trained(models: DiffusersModels, denoiser: Any = None, **changes: Any) -> Concept:
    on_event = changes.pop("on_event", lambda event: None)
    settings = {"steps": 2, "batch_size": 5, "learning_rate": 1e-3, "resolution": RESOLUTION}
    config = TrainConfig(preview_every_steps=0, **{**settings, **changes})
    concept = cat_concept(2, regularization=2)
    bank = random_bank(concept)
    return train(
        config,
        [concept],
        [bank],
        denoiser or models.denoiser,
        models.text_encoder,
        on_event=on_event,
    )


class Crowded:
    """A denoiser on a device whose memory holds so many samples, more with checkpointing."""

    def __init__(self, denoiser: Any, most: int, most_checkpointed: int) -> None:
        self._denoiser, self._most = denoiser, most
        self._most_checkpointed = most_checkpointed
        self.seen: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def predict(self, noisy_latents_bchw: Tensor, *others: Tensor | None) -> Tensor:
        block = self.network.get_submodule(self.blocks[0])
        most = self._most_checkpointed if "forward" in vars(block) else self._most
        self.seen.append(len(noisy_latents_bchw))
        if len(noisy_latents_bchw) > most:
            raise torch.OutOfMemoryError(f"{len(noisy_latents_bchw)} are too many")
        return self._denoiser.predict(noisy_latents_bchw, *others)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 7])
def test_parts_of_a_batch_make_the_same_step(
    models: DiffusersModels, micro_batch_size: int
) -> None:
    assert_same_but_for_rounding(
        trained(models), trained(models, micro_batch_size=micro_batch_size)
    )


def test_checkpointing_makes_the_same_step(models: DiffusersModels) -> None:
    assert_same_but_for_rounding(trained(models), trained(models, gradient_checkpointing=True))


def test_checkpointing_keeps_the_inputs_of_blocks_only(models: DiffusersModels) -> None:
    denoiser = models.denoiser
    latents = torch.randn(4, 4, RESOLUTION // 8, RESOLUTION // 8)
    context = torch.randn(4, 77, denoiser.family.context_width, requires_grad=True)
    kept = []
    for blocks in ((), denoiser.blocks):
        with recomputed(denoiser.network, blocks), kept_bytes() as total:
            denoiser.predict(latents, torch.tensor([1, 2, 3, 4]), context)
        kept += total
    assert kept[1] < 0.5 * kept[0]
    assert len(denoiser.blocks) == len(set(denoiser.blocks)) > 6


def test_the_network_is_as_before_after_checkpointing(models: DiffusersModels) -> None:
    network = models.denoiser.network
    first, *_ = models.denoiser.blocks
    module = network.get_submodule(first)
    own = {"of an instance": lambda *args: None}
    with recomputed(network, models.denoiser.blocks):
        assert "forward" in vars(module)
    assert all("forward" not in vars(part) for part in network.modules())
    module.forward = own["of an instance"]
    try:
        with pytest.raises(RuntimeError), recomputed(network, models.denoiser.blocks):
            raise RuntimeError
        assert module.forward is own["of an instance"]
    finally:
        del module.forward


def test_when_memory_runs_out_the_step_is_made_with_less(models: DiffusersModels) -> None:
    crowded = Crowded(models.denoiser, most=2, most_checkpointed=2)
    events: list[Event] = []
    learnt = trained(models, crowded, on_event=events.append)
    assert_same_but_for_rounding(trained(models), learnt)
    assert crowded.seen == [5, 3, 2, 2, 1, 2, 2, 1], "halved until it fits, and so it stays"
    kinds = [type(event) for event in events]
    assert kinds == [MemoryShort, MemoryShort, StepDone, StepDone]
    assert events[1] == MemoryShort(1, 2, False)


def test_when_one_sample_is_too_much_there_is_checkpointing(models: DiffusersModels) -> None:
    crowded = Crowded(models.denoiser, most=0, most_checkpointed=1)
    events: list[Event] = []
    learnt = trained(models, crowded, on_event=events.append)
    assert_same_but_for_rounding(trained(models), learnt)
    assert events[-3] == MemoryShort(1, 1, True)
    assert "1 of the pictures at once, with gradient checkpointing" in events[-3].text()


def test_when_the_least_is_too_much_the_error_is_raised(models: DiffusersModels) -> None:
    crowded = Crowded(models.denoiser, most=0, most_checkpointed=0)
    with pytest.raises(torch.OutOfMemoryError, match="1 are too many"):
        trained(models, crowded)
    assert crowded.seen == [5, 3, 2, 1, 1]
    assert all("forward" not in vars(part) for part in models.denoiser.network.modules())
