"""The copies that trainings work on, beside ComfyUI's own models: who keeps what alive, and when a
copy is made again.
"""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from custom_diffusion.concept.errors import ModelsGoneError, TrainingError
from custom_diffusion.trainer.checkpoint import Checkpoint
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.events import CheckpointDue, StepDone
from custom_diffusion.trainer.jobs.snapshot import JobState
from custom_diffusion.trainer.jobs.work import Work
from custom_diffusion.trainer.request import TrainingRequest
from support.concepts import random_concept
from support.tiny_models import cat_concept

CONFIG = TrainConfig()


@pytest.fixture
def lent(comfy: Any) -> Any:
    """The module; it can be imported once ComfyUI is there."""
    from custom_diffusion.host.comfyui.jobs import models as job_models

    job_models.shared_copy.drop()
    yield job_models
    job_models.shared_copy.drop()


@pytest.fixture
def loaded(comfy: Any, checkpoint_file: Callable[[str], Path]) -> Any:
    """MODEL and CLIP of its own, which a test may let go of."""
    with torch.inference_mode():
        model, clip, _, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint_file("sd15")))
    return SimpleNamespace(model=model, clip=clip)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch, comfy: Any) -> Iterator[Any]:
    """Stands in for ComfyUI's queue of prompts, in a server that nobody listens to."""
    from server import PromptServer

    queue = SimpleNamespace(currently_running={}, task_counter=0)
    server = SimpleNamespace(prompt_queue=queue, send_sync=lambda *_: None)
    monkeypatch.setattr(PromptServer, "instance", server, raising=False)
    yield queue


def never() -> bool:
    return False


def weights(models: Any) -> dict[str, torch.Tensor]:
    network, text = models.denoiser.network, models.encoder._model
    return {**network.state_dict(), **{f"text.{k}": v for k, v in text.state_dict().items()}}


def test_a_base_keeps_nothing_alive(lent: Any, loaded: Any, prompts: Any) -> None:
    models = lent.copy_models(loaded.model, loaded.clip, CONFIG)
    base = lent.Base(loaded.model, loaded.clip, CONFIG, models)
    network = weakref.ref(loaded.model.model)
    copy = weakref.ref(models.denoiser.network)
    again = base.copy(never)
    before, after = weights(models), weights(again)
    assert before.keys() == after.keys() and len(before) > 500
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(before[name].data_ptr() == after[name].data_ptr() for name in before)
    assert not any(tensor.is_inference() for tensor in after.values())
    del models, again, before, after, loaded.model, loaded.clip
    gc.collect()
    assert network() is None and copy() is None and not base.is_loaded
    with pytest.raises(ModelsGoneError, match="Queue its graph again"):
        base.copy(never)


def test_jobs_of_one_base_share_a_copy_and_others_do_not(
    lent: Any, sd15: Any, prompts: Any
) -> None:
    first = lent.copy_models(sd15.model, sd15.clip, CONFIG)
    base, same = (lent.Base(sd15.model, sd15.clip, CONFIG, first) for _ in range(2))
    lent.shared_copy.keep(base, first)
    assert lent.shared_copy.at_turn_of(base, never) is first
    assert lent.shared_copy.at_turn_of(same, never) is first
    kept = weakref.ref(first.denoiser.network)

    skipped = sd15.clip.clone()
    skipped.clip_layer(-2)
    other = lent.copy_models(sd15.model, skipped, CONFIG)
    another = lent.Base(sd15.model, skipped, CONFIG, other)
    assert not lent.shared_copy.has(another)
    del first, other
    got = lent.shared_copy.at_turn_of(another, never)
    gc.collect()
    assert got is not None and kept() is None, "the first copy went before the second was made"
    lent.shared_copy.drop()
    assert not lent.shared_copy.has(another)


def test_a_copy_is_made_between_prompts(lent: Any, sd15: Any, prompts: Any) -> None:
    base = lent.Base(sd15.model, sd15.clip, CONFIG, lent.copy_models(sd15.model, sd15.clip, CONFIG))
    prompts.currently_running = {0: "a prompt"}
    asked = 0

    def leave_at_last() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    assert base.copy(leave_at_last) is None and asked == 3

    def end_the_prompt() -> bool:
        prompts.currently_running = {}
        return False

    assert base.copy(end_the_prompt) is not None


def test_a_copy_that_a_prompt_has_come_into_is_made_again(
    lent: Any, sd15: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = lent.Base(sd15.model, sd15.clip, CONFIG, lent.copy_models(sd15.model, sd15.clip, CONFIG))
    copies = 0
    whole = lent.copy_models

    def copy_beside_a_prompt(*arguments: Any) -> Any:
        nonlocal copies
        copies += 1
        made = whole(*arguments)
        if copies == 1:  # a prompt begins, changes a weight of the copy, and ends
            prompts.task_counter += 1
            next(made.denoiser.network.parameters()).zero_()
        if copies == 2:
            prompts.task_counter += 1
            raise RuntimeError("a weight has moved")
        return made

    monkeypatch.setattr(lent, "copy_models", copy_beside_a_prompt)
    got = base.copy(never)
    assert copies == 3
    assert next(got.denoiser.network.parameters()).abs().sum() > 0


def test_a_model_that_has_changed_since_is_not_the_one_that_was_queued(
    lent: Any, loaded: Any, prompts: Any
) -> None:
    base = lent.Base(
        loaded.model, loaded.clip, CONFIG, lent.copy_models(loaded.model, loaded.clip, CONFIG)
    )
    with torch.inference_mode():
        loaded.model.model.diffusion_model.out[2].weight.add_(1)
    assert base.is_loaded
    with pytest.raises(ModelsGoneError):
        base.copy(never)
    assert not base.is_loaded, "nobody is to wait for them any more"


def test_a_job_that_waits_uses_an_equal_model_that_a_later_prompt_brings(
    lent: Any, loaded: Any, prompts: Any
) -> None:
    models = lent.copy_models(loaded.model, loaded.clip, CONFIG)
    first = loaded.model.clone(), loaded.clip.clone()
    waits = lent.Base(*first, CONFIG, models)
    again = lent.Base(loaded.model, loaded.clip, CONFIG, models)
    del again, first
    gc.collect()
    assert waits.is_loaded
    assert waits.copy(never) is not None

    later = loaded.model.clone(), loaded.clip.clone()
    lent.Base(*later, CONFIG, models)
    del later
    gc.collect()
    assert waits.is_loaded, "the one before it is there still"
    del loaded.model, loaded.clip
    gc.collect()
    assert not waits.is_loaded


def test_equal_models_are_remembered_no_longer_than_their_jobs(
    lent: Any, loaded: Any, prompts: Any
) -> None:
    models = lent.copy_models(loaded.model, loaded.clip, CONFIG)
    bases = [lent.Base(loaded.model, loaded.clip, CONFIG, models) for _ in range(3)]
    key = bases[0].key
    assert key in lent._loaded
    bases.clear()
    gc.collect()
    assert key not in lent._loaded


@pytest.mark.parametrize("how", ["its models go", "its folder goes"])
def test_a_prompt_does_not_wait_for_a_paused_job_that_nobody_here_can_resume(
    lent: Any, prompts: Any, tmp_path: Path, how: str
) -> None:
    from custom_diffusion.host.comfyui.jobs.service import wait_for
    from custom_diffusion.trainer.jobs.folder import JobFolder
    from custom_diffusion.trainer.jobs.job import Job
    from custom_diffusion.trainer.jobs.work import Work

    there = True
    work = Work(lambda *_: None, lambda *_: Path(), has_models=lambda: there)
    job = Job(JobFolder.create(tmp_path, "dog", {"steps": 3}), work)
    job.pause()
    if how == "its models go":
        there = False
    else:
        shutil.rmtree(job.folder.path)
    with pytest.raises(TrainingError, match="Queue the graph again"):
        wait_for(job)


@pytest.mark.parametrize("method", ["custom diffusion", "dreambooth"])
def test_a_training_is_known_by_weights_that_were_never_copied_together(
    lent: Any, loaded: Any, method: Any
) -> None:
    """A patched model's too; its fingerprint is the one that the copy has."""
    from custom_diffusion.trainer.jobs.fingerprint import models_fingerprint

    config = TrainConfig(method=method)
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    weight = loaded.model.get_model_object(key)
    plain = models_fingerprint_of(lent, loaded, config)
    loaded.model.add_patches({key: ("diff", (torch.ones(weight.shape),))})
    copies = lent.copy_models(loaded.model, loaded.clip, config)
    patched = models_fingerprint_of(lent, loaded, config)
    assert patched == models_fingerprint(copies.encoder, [copies.denoiser.network])
    assert patched != plain


def models_fingerprint_of(lent: Any, loaded: Any, config: TrainConfig) -> str:
    from custom_diffusion.host.comfyui.models.text import text_encoder
    from custom_diffusion.trainer.jobs.fingerprint import models_fingerprint

    weights = lent.unet_weights(loaded.model, config)
    return models_fingerprint(text_encoder(loaded.clip), [weights])


def test_a_finished_graph_is_handed_out_without_a_copy_of_its_unet(
    lent: Any, loaded: Any, load: Any, prompts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from custom_diffusion.host.comfyui.jobs import service as job_service
    from custom_diffusion.host.comfyui.jobs import training
    from custom_diffusion.trainer.jobs.service import TrainingService

    service = TrainingService(tmp_path / "jobs")
    monkeypatch.setattr(training, "training_service", lambda: service)
    monkeypatch.setattr(job_service, "training_service", lambda: service)
    monkeypatch.setattr(training, "concept_folder", lambda: tmp_path)
    config = TrainConfig(
        method="textual inversion", steps=1, batch_size=1, resolution=64, preview_every_steps=0
    )
    copies: list[object] = []
    copy_unet = training.copy_unet

    def counted(*given: Any) -> Any:
        copies.append(given)
        return copy_unet(*given)

    monkeypatch.setattr(training, "copy_unet", counted)

    def start() -> Any:
        return training.start_training(
            "cat",
            TrainingRequest(config, [cat_concept()]),
            training.Origin(loaded.model, loaded.clip, load("sd15").vae, {}, "1"),
            checkpoint_every_steps=50,
            share_device=True,
            keep_best=1,
        )

    first = start()
    assert first.wait(120)
    assert first.snapshot().state is JobState.FINISHED, first.snapshot().log
    assert len(copies) == 1
    assert start() is first
    assert len(copies) == 1


def test_a_job_that_waits_is_offered_models_without_a_copy_of_the_unet(
    lent: Any, loaded: Any, load: Any, prompts: Any
) -> None:
    """What it was queued with has gone; the same graph, queued again, brings equal ones."""
    waits = lent.Base(
        loaded.model, loaded.clip, CONFIG, lent.copy_models(loaded.model, loaded.clip, CONFIG)
    )
    wanted = weights(waits.copy(never))
    loaded.model = loaded.clip = None
    gc.collect()
    assert not waits.is_loaded
    again = load("sd15")
    encoder = lent.text_encoder(again.clip)
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    other = again.model.clone()
    other.add_patches({key: ("diff", (torch.ones(again.model.get_model_object(key).shape),))})
    lent.offer(other, again.clip, CONFIG, encoder)
    assert not waits.is_loaded  # another model is no help
    lent.offer(again.model, again.clip, CONFIG, encoder)
    assert waits.is_loaded
    got = weights(waits.copy(never))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("early", ["pause", "stop", None])
@pytest.mark.parametrize("window", ["loop", "left", "models go"])
def test_an_interrupted_prompt_is_released_whatever_its_job_is_about_to_do(
    prompts: Any,
    comfy: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    early: Any,
    window: str,
) -> None:
    from comfy.model_management import InterruptProcessingException
    from custom_diffusion.host.comfyui.jobs import service as job_service
    from custom_diffusion.trainer.jobs.service import TrainingService

    arrived, go_on = threading.Event(), threading.Event()

    def reach(here: str) -> None:
        if here == window and not arrived.is_set():
            arrived.set()
            assert go_on.wait(30)

    def train(checkpoint: Any, should_stop: Any, on_event: Any) -> Any:
        losses = list(checkpoint.losses) if checkpoint else []
        while len(losses) < 3 and not should_stop():
            losses.append(1.0)
            on_event(StepDone(len(losses), 1.0))
            if early and losses == [1.0]:
                getattr(service, early)(service.jobs()[0].id)
            reach("loop")
        on_event(CheckpointDue(Checkpoint(tuple(losses), (torch.zeros(1),), ({},)), None))
        reach("left")
        return random_concept()

    @contextmanager
    def turn(_: object) -> Iterator[bool]:
        yield True
        reach("models go")

    service = TrainingService(tmp_path / "jobs")
    monkeypatch.setattr(job_service, "training_service", lambda: service)
    job = service.submit("cat", 3, {}, Work(train, lambda *_: tmp_path / "cat", turn=turn))
    assert arrived.wait(30)
    polls: list[bool] = []

    def interrupted() -> None:
        polls.append(True)
        raise InterruptProcessingException

    real_stop = service.stop

    def stop(job_id: str) -> None:
        real_stop(job_id)
        go_on.set()  # only now does the job go on to what it was about to do

    monkeypatch.setattr(service, "stop", stop)
    monkeypatch.setattr(
        comfy.model_management, "throw_exception_if_processing_interrupted", interrupted
    )
    released: list[BaseException] = []

    def wait() -> None:
        try:
            job_service.wait_for(job)
        except InterruptProcessingException as error:
            released.append(error)

    prompt = threading.Thread(target=wait, daemon=True)
    prompt.start()
    prompt.join(30)
    assert released, f"it waits for {job.snapshot()}"
    assert job.wait(30)
    finished = window != "loop" and early is None
    assert job.snapshot().state is (JobState.FINISHED if finished else JobState.STOPPED)
