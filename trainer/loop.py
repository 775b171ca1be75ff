"""The training loop, to be read from top to bottom; no threads, no server, no ComfyUI."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from ..concept.concept import Concept, Delta, ModifierToken
from ..concept.errors import ConfigError, TrainingError
from ..concept.prompts import subject
from ..concept.text import TextEncoder
from ..diffusion.noise import add_noise, target
from ..diffusion.protocols import Denoiser
from ..diffusion.sampling import ddim_sample
from .checkpoint import Checkpoint
from .config import TrainConfig
from .data.latents import LatentBank, batch_of_step, step_randomness
from .data.training_concept import TrainingConcept
from .economy.backward import Backward
from .economy.cpu_attention import cpu_attention
from .economy.frozen_layers import channels_last, keeping_less
from .economy.processes import DataParallel
from .events import CheckpointDue, Event, MemoryShort, PreviewDrawn, StepDone, WordsMoved
from .learning.network_weights import NetworkWeights
from .learning.objective import sample_losses, sample_weights
from .learning.optimizer import make_optimizer
from .learning.projections import KeyValueProjections
from .learning.prompt_features import PromptFeatures
from .learning.tokens import drift, words_to_teach
from .methods import METHODS
from .start import check_start

_FINAL_LOSSES = 20
_DRIFT_EVERY_STEPS = 10
_LARGE_FROM = 256  # pixels


def train(
    config: TrainConfig,
    training_concepts: Sequence[TrainingConcept],
    banks: Sequence[LatentBank],
    denoiser: Denoiser,
    text_encoder: TextEncoder,
    *,
    start: Concept | None = None,
    checkpoint: Checkpoint | None = None,
    checkpoint_every_steps: int = 0,
    parallel: DataParallel = DataParallel(),  # noqa: B008
    should_stop: Callable[[], bool] = lambda: False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Concept:
    """Teaches concepts together and returns what was learnt as one concept.

    `banks` hold the latents of each; `config.method` says which parts of the model learn.
    `start` is a concept of the same model to go on from: all of it is in the result, and the
    tokens that are taught again learn on.
    `checkpoint` is what a run with the same arguments left: this one goes on as that would have,
    to the bit. With `checkpoint_every_steps` there is one as often, and one at the end.
    `parallel` is this process's place among several that call this with the same arguments.
    `should_stop` is asked before every step; stopping returns what was learnt so far. The models
    are only borrowed: afterwards, however it ends, they are as before, except for what a method
    learns beyond keys, values and words: that stays in the denoiser's network. Random numbers come
    from the seed alone. Raises TrainingError when the loss is not finite.
    """
    if len(training_concepts) != len(banks):
        raise ValueError(f"{len(training_concepts)} concepts need as many banks, not {len(banks)}")

    parallel.check(config.batch_size)

    # What is trained, all in float32: keys and values, the embedding of every V*, and in some
    # methods more of the network.
    method = METHODS[config.method]
    start = start or Concept(denoiser.family, {})
    further_layers = method.further_layers(denoiser)
    check_start(start, denoiser, config)
    words = words_to_teach(training_concepts, start, text_encoder, denoiser.device)
    began = {name: {t: r.detach().clone() for t, r in rows.items()} for name, rows in words.items()}
    learning_words = words if method.learns_words else {}
    known = {name: {**r, **words.get(name, {})} for name, r in start.embeddings().items()}
    prompts = PromptFeatures(text_encoder.with_tokens(known), learning_words, config.gradient_cut)
    projections = method.projections(denoiser, start.deltas, config)
    network = NetworkWeights(denoiser, start.deltas, further_layers, method.whole_network)
    rows = [row for tokens in learning_words.values() for row in tokens.values()]
    parameters = [*projections.parameters(), *rows, *network.parameters()]
    if not words and (method.whole_network or not parameters):
        raise _nothing_to_keep(config)
    optimizer = make_optimizer(config, parameters)

    base_hash = projections.base_hash  # of the network's own keys and values

    def learnt() -> Concept:
        deltas = {**projections.deltas(), **network.deltas()}
        return _concept(
            config, training_concepts, start, denoiser, base_hash, deltas, words, losses
        )

    def report_checkpoint() -> None:
        concept = None if method.whole_network else learnt()
        on_event(CheckpointDue(Checkpoint.of(optimizer, losses), concept))

    losses: list[float] = []
    backward = Backward(
        denoiser,
        config.micro_batch_size,
        config.gradient_checkpointing,
        on_less=lambda *now: on_event(MemoryShort(len(losses) + 1, *now)),
    )

    # Measured on a CPU: neither helps with small latents, nor channels last in float32.
    large = config.resolution >= _LARGE_FROM and denoiser.dtype != torch.float32
    layout = channels_last(denoiser.network) if large else nullcontext()
    on_cpu = large and denoiser.device.type == "cpu"
    attention = cpu_attention(denoiser.network) if on_cpu else nullcontext()
    with (
        layout,
        attention,
        projections.installed(),
        network.learning(),
        keeping_less(denoiser.network),
    ):
        if checkpoint:
            losses = checkpoint.restore(optimizer)
        while len(losses) < config.steps and not should_stop():
            # Data: latents, noise, timesteps.
            rng, generator = step_randomness(config.seed, len(losses))
            batch = batch_of_step(banks, config, len(losses), rng, generator)
            noise = torch.randn(batch.latents_bchw.shape, generator=generator)
            timesteps = torch.randint(
                len(denoiser.alphas_cumprod), (config.batch_size,), generator=generator
            )
            latents, noise, timesteps, masks, sizes = (
                t.to(denoiser.device)
                for t in (batch.latents_bchw, noise, timesteps, batch.masks_bhw, batch.sizes)
            )

            # Text, once for all samples: leaves take the gradients of its features.
            text, keep = prompts.encode(batch.prompts)
            context, pooled = (_leaf(features) for features in text)

            # Loss: denoising in the valid region, and prior preservation.
            noisy = add_noise(latents, noise, timesteps, denoiser.alphas_cumprod)
            wanted = target(latents, noise, timesteps, denoiser.alphas_cumprod, denoiser.prediction)
            weights = sample_weights(len(noisy), batch.prior, config.prior_weight).to(noisy)

            # Gradients: of the UNet, then through it of the text encoder.
            samples = (noisy, timesteps, context, pooled, sizes, keep, wanted, masks, weights)
            leaves = [leaf for leaf in (context, pooled) if leaf is not None]
            own = parallel.part(samples)
            loss = backward(partial(_loss_of, projections), own, [*parameters, *leaves])
            _pass_on(leaves, [features for features in text if features is not None])
            loss = parallel.add_up(loss, parameters)
            _check_finite(loss, len(losses) + 1, config, denoiser)

            # Update.
            if config.max_gradient_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, config.max_gradient_norm)
            optimizer.step()

            # Report.
            losses.append(loss)
            on_event(StepDone(len(losses), losses[-1]))
            if learning_words and len(losses) % _DRIFT_EVERY_STEPS == 0:
                on_event(WordsMoved(drift(words, began)))
            if config.preview_every_steps and len(losses) % config.preview_every_steps == 0:
                fixed = torch.Generator().manual_seed(config.seed)
                noise = torch.randn(batch.latents_bchw[:1].shape, generator=fixed)
                picture = _preview(noise, training_concepts[0], prompts, projections, denoiser)
                on_event(PreviewDrawn(len(losses), picture))
            if checkpoint_every_steps and len(losses) % checkpoint_every_steps == 0:
                report_checkpoint()

        if checkpoint_every_steps and len(losses) % checkpoint_every_steps:
            report_checkpoint()
        return learnt()


def _loss_of(
    projections: KeyValueProjections,
    noisy: Tensor,
    timesteps: Tensor,
    context: Tensor,
    pooled: Tensor | None,
    sizes: Tensor,
    keep: Tensor | None,
    wanted: Tensor,
    masks: Tensor,
    weights: Tensor,
) -> Tensor:
    """What some samples add to the loss of a step."""
    prediction = projections.predict(noisy, timesteps, context, pooled, sizes, keep=keep)
    # Not as a product of vectors: where weights of the network learn, autocast would round it.
    return (weights * sample_losses(prediction, wanted, masks)).sum()


def _leaf(features: Tensor | None) -> Tensor | None:
    """The same numbers, as a tensor that gradients stop at."""
    return None if features is None else features.detach().requires_grad_(features.requires_grad)


def _pass_on(leaves: Sequence[Tensor], features: Sequence[Tensor]) -> None:
    """Gradients that the leaves have taken, to what they were made from."""
    reached = [
        (made_from, leaf.grad)
        for leaf, made_from in zip(leaves, features, strict=True)
        if leaf.grad is not None
    ]
    if reached:
        made_from, gradients = zip(*reached, strict=True)
        torch.autograd.backward(made_from, gradients)


def _concept(
    config: TrainConfig,
    training_concepts: Sequence[TrainingConcept],
    start: Concept,
    denoiser: Denoiser,
    base_hash: str,
    deltas: Mapping[str, Delta],
    words: Mapping[str, Mapping[str, Tensor]],
    losses: list[float],
) -> Concept:
    taught = {
        concept.token: ModifierToken(
            name=concept.token,
            class_noun=concept.class_noun,
            initializer=concept.initializer,
            embeddings={name: rows[concept.token].detach().cpu() for name, rows in words.items()},
        )
        for concept in training_concepts
        if concept.token
    }
    prompts = [
        prompt
        for concept in training_concepts
        for prompt in (subject(concept.token, concept.class_noun), concept.prompt)
    ]
    return Concept(
        family=denoiser.family,
        deltas=deltas,
        tokens=tuple(({token.name: token for token in start.tokens} | taught).values()),
        base_hash=base_hash,
        constraint_prompts=tuple(dict.fromkeys([*start.constraint_prompts, *prompts])),
        provenance={
            **({"went_on_from": start.describe()} if start.tokens or start.deltas else {}),
            "method": config.method,
            "steps": len(losses),
            "final_losses": losses[-_FINAL_LOSSES:],
            "instance_images": sum(len(concept.images) for concept in training_concepts),
            "regularization_images": sum(
                len(concept.regularization) for concept in training_concepts
            ),
            "config": config.as_json(),
        },
    )


def _preview(
    noise: Tensor,
    training_concept: TrainingConcept,
    prompts: PromptFeatures,
    projections: KeyValueProjections,
    denoiser: Denoiser,
) -> Tensor:
    """A sample from the same noise every time, so that previews of one run can be compared."""
    with torch.no_grad():
        text, _ = prompts.encode([training_concept.prompt])
        nothing, _ = prompts.encode([""])
        latents = ddim_sample(
            projections.predict,
            noise.to(denoiser.device),
            text,
            nothing,
            denoiser.alphas_cumprod,
            denoiser.prediction,
        )
        return denoiser.preview(latents)[0].float().cpu()


def _nothing_to_keep(config: TrainConfig) -> ConfigError:
    return ConfigError(
        f"What the method {config.method!r} leaves beside a UNet is a word, and no concept has "
        f"a modifier token. Give one, '<new1>' say, or choose another method."
    )


def _check_finite(loss: float, step: int, config: TrainConfig, denoiser: Denoiser) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"The loss became {loss} at step {step} (learning rate {config.learning_rate:g}, "
            f"weights in {str(denoiser.dtype).removeprefix('torch.')}). A finite number was "
            "needed, so training stopped before this step changed anything. Lower the learning "
            "rate, or train in float32."
        )
