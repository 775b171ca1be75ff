"""The training loop, to be read from top to bottom; no threads, no server, no ComfyUI."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..concept.concept import Concept, alike_tokens
from ..concept.errors import TrainingError
from ..concept.text import TextEncoder, TextFeatures
from ..diffusion.latents import LATENT_PIXELS
from ..diffusion.protocols import Denoiser
from ..diffusion.sampling import ddim_sample
from .checkpoint import Checkpoint
from .config import TrainConfig
from .data.batches import Batch, Batches, step_randomness
from .data.latents import LatentBank
from .data.training_concept import TrainingConcept
from .economy.backward import Backward
from .economy.economical import economical
from .economy.processes import Replica
from .events import (
    Bucketed,
    Event,
    MemoryShort,
    PreviewBegun,
    PreviewDrawn,
    RegularizationLeftOut,
    StepDone,
    WordsAlike,
    WordsMoved,
)
from .learner import Learner
from .learning.samples import drawn_noise, samples_of
from .validation import Validation

_DRIFT_EVERY_STEPS = 10


def train(
    config: TrainConfig,
    training_concepts: Sequence[TrainingConcept],
    banks: Sequence[LatentBank],
    denoiser: Denoiser,
    text_encoder: TextEncoder,
    *,
    earlier: Concept | None = None,
    checkpoint: Checkpoint | None = None,
    checkpoint_every_steps: int = 0,
    replica: Replica = Replica(),  # noqa: B008
    should_stop: Callable[[], bool] = lambda: False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Concept:
    """Teaches concepts together and returns what was learnt as one concept.

    `banks` hold the latents of each; `config.method` says which parts of the model learn.
    `earlier` is a concept of the same model to go on from: all of it is in the result, and the
    tokens that are taught again learn on.
    `checkpoint` is what a run with the same arguments left: this one goes on as that would have,
    to the bit. With `checkpoint_every_steps` there is one as often, and one at the end.
    Pictures that the banks keep back are measured on; with early stopping the run ends when their
    loss no longer falls, and returns what it had learnt where that was lowest.
    `replica` is this process's place among several that call this with the same arguments.
    `should_stop` is asked before every step; stopping returns what was learnt so far. The models
    are only borrowed: afterwards, however it ends, they are as before, except for what a method
    learns beyond keys, values and words: that stays in the denoiser's network. Random numbers come
    from the seed alone. Raises TrainingError when the loss is not finite.
    """
    if len(training_concepts) != len(banks):
        raise ValueError(f"{len(training_concepts)} concepts need as many banks, not {len(banks)}")
    replica.check(config.batch_size)
    batches = Batches(banks, config)
    learner = Learner(config, training_concepts, earlier, denoiser, text_encoder)
    validation = Validation(config, banks, denoiser, learner, replica)
    for notice in _notices(training_concepts, banks, batches, earlier):
        on_event(notice)
    losses: list[float] = []
    backward = Backward(
        denoiser,
        config.micro_batch_size,
        config.gradient_checkpointing,
        on_less=lambda *now: on_event(MemoryShort(len(losses) + 1, *now)),
    )
    with learner.learning(), economical(denoiser, config.resolution):
        if checkpoint:
            validation.restore(checkpoint)
            losses = checkpoint.restore(learner.optimizer)
        while len(losses) < config.steps and not validation.ended and not should_stop():
            # Data: latents, noise, timesteps; text, once for all samples.
            rng, generator = step_randomness(config.seed, len(losses))
            batch = batches.of_step(len(losses), rng, generator)
            text = learner.prompts.encode(batch.prompts)
            leaves = text.as_leaves()
            drawn = drawn_noise(batch, generator, denoiser, config)
            words = learner.places(batch, text.features.context)
            samples = samples_of(batch, *drawn, leaves, denoiser, config, words)
            samples = learner.with_class_prior(samples, batch)

            # Gradients: of the UNet, then through the leaves of the text encoder.
            reached = [*learner.parameters, *leaves.tensors()]
            loss = backward(learner.loss_of, replica.part(samples), reached)
            text.pass_on(leaves)
            loss = replica.add_up(loss, learner.parameters)
            _check_finite(loss, len(losses) + 1, config, denoiser, samples.context)

            # Update, and report.
            learner.step(len(losses))
            losses.append(loss)
            for event in _reports(len(losses), loss, config, learner, denoiser, batch, validation):
                on_event(event)
            if checkpoint_every_steps and len(losses) % checkpoint_every_steps == 0:
                on_event(learner.checkpoint(losses, validation.losses, validation.best))

        if checkpoint_every_steps and len(losses) % checkpoint_every_steps:
            on_event(learner.checkpoint(losses, validation.losses, validation.best))
        with learner.as_learnt():
            return learner.concept(validation.take_best(losses))


def _notices(
    training_concepts: Sequence[TrainingConcept],
    banks: Sequence[LatentBank],
    batches: Batches,
    earlier: Concept | None,
) -> Iterator[Event]:
    """What is told before the first step."""
    if len(batches.pictures) > 1:
        yield Bucketed(batches.pictures, batches.fewer)
    pairs = zip(training_concepts, banks, strict=True)
    if unused := sum(len(one.regularization) for one, bank in pairs if not bank.regularization):
        yield RegularizationLeftOut(unused)
    for pair in alike_tokens(earlier.tokens if earlier else ()):
        yield WordsAlike(*pair)


def _reports(
    step: int,
    loss: float,
    config: TrainConfig,
    learner: Learner,
    denoiser: Denoiser,
    batch: Batch,
    validation: Validation,
) -> Iterator[Event]:
    """What is told after a step."""
    measured = validation.after(step)
    yield StepDone(step, loss, measured)
    if measured is not None and (advice := validation.advice(step)):
        yield advice
    if step % _DRIFT_EVERY_STEPS == 0 and (drift := learner.drift()):
        yield WordsMoved(drift)
    if config.preview_every_steps and step % config.preview_every_steps == 0:
        yield PreviewBegun(step)
        yield PreviewDrawn(step, _preview(config, learner, denoiser, batch))


def _preview(config: TrainConfig, learner: Learner, denoiser: Denoiser, batch: Batch) -> Tensor:
    """A sample of each prompt, side by side, and of each seed, below each other, (h, w, 3); always
    from the same noise, so that those of one run can be compared.
    """
    chosen = [line for line in config.preview_prompts.splitlines() if line.strip()]
    prompts = chosen or [learner.prompt]
    with learner.as_learnt():
        rows = [
            torch.cat([_sample(config, p, seed, learner, denoiser, batch) for p in prompts], dim=1)
            for seed in config.sample_seeds
        ]
    return torch.cat(rows)


def _sample(
    config: TrainConfig, prompt: str, seed: int, learner: Learner, denoiser: Denoiser, batch: Batch
) -> Tensor:
    fixed = torch.Generator().manual_seed(seed)
    edge = (config.preview_resolution or config.resolution) // LATENT_PIXELS
    noise = torch.randn((1, batch.latents_bchw.shape[1], edge, edge), generator=fixed)
    with torch.no_grad():
        (context, pooled), _, own = learner.prompts.encode([prompt, ""])
        text, nothing = (
            TextFeatures(context[n : n + 1], None if pooled is None else pooled[n : n + 1])
            for n in range(2)
        )
        latents = ddim_sample(
            partial(learner.projections.predict, own=own),
            noise.to(denoiser.device),
            text,
            nothing,
            denoiser.alphas_cumprod,
            denoiser.prediction_type,
        )
        return denoiser.preview(latents)[0].float().cpu()


def _check_finite(
    loss: float, step: int, config: TrainConfig, denoiser: Denoiser, context: Tensor
) -> None:
    if math.isfinite(loss):
        return
    dtype = str(denoiser.dtype).removeprefix("torch.")
    remedy = "Lower the learning rate, or train in float32."
    if step == 1:  # nothing has been learnt
        part = "the UNet" if context.isfinite().all() else "the text encoder"
        exact = "" if denoiser.dtype == torch.float32 else "train in float32, or "
        remedy = (
            f"The learning rate is not to blame: {part} itself makes numbers that are not finite. "
            f"Its weights, or a LoRA on them, are broken or too large for {dtype}: {exact}load "
            f"another copy of the checkpoint without LoRAs."
        )
    raise TrainingError(
        f"The loss became {loss} at step {step} (learning rate {config.learning_rate:g}, weights "
        f"in {dtype}). A finite number was needed, so training stopped before this step changed "
        f"anything. {remedy}"
    )
