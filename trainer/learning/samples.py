"""What one step computes a loss of: samples side by side, of which a part can be taken."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ...diffusion.noise import add_noise, target
from ...diffusion.protocols import Denoiser
from ..config import TrainConfig
from ..data.batches import Batch
from .objective import sample_losses, sample_weights
from .projections import KeyValueProjections
from .prompt_features import PromptText, lengthened
from .weighting import drawn_timesteps, loss_weights, offset
from .word_attention import WordAttention, WordPlaces


@dataclass(frozen=True)
class Samples:
    """All on the device that trains. A slice of it is its part of the samples."""

    noisy_latents_bchw: Tensor
    timesteps: Tensor
    context: Tensor
    """Features of the prompts (b, n, d)"""
    pooled: Tensor | None
    """(b, w), for UNets that read it"""
    sizes: Tensor
    passing: Tensor | None
    """One where gradients of keys and values may pass (b, n)"""
    own: Tensor | None
    """One where keys and values change at all (b, n); None where they do everywhere"""
    target_bchw: Tensor
    masks_bhw: Tensor
    weights: Tensor
    """What each sample's loss counts"""
    word_rows: Tensor | None = None
    word_masks: Tensor | None = None
    """`WordPlaces` of each, where words are kept inside their masks"""
    imitates: Tensor | None = None
    """Which are to be predicted as the network itself does (b,), on the CPU; None where none is"""

    def __len__(self) -> int:
        return len(self.noisy_latents_bchw)

    def lengthened(self, rows: int) -> Samples:
        """With texts of so many rows, a multiple of what they have: the same ones again."""
        along = {"context": 1, "passing": 1, "own": 1, "word_rows": 2}
        values = {name: getattr(self, name) for name in along}
        longer = {n: lengthened(v, rows, along[n]) for n, v in values.items() if v is not None}
        return replace(self, **longer)

    def __getitem__(self, part: slice) -> Samples:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: v[part] for k, v in values.items() if v is not None})


def drawn_noise(
    batch: Batch, generator: torch.Generator, denoiser: Denoiser, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Noise and timesteps of a step."""
    noise = torch.randn(batch.latents_bchw.shape, generator=generator)
    count, schedule = len(noise), len(denoiser.alphas_cumprod)
    timesteps = drawn_timesteps(config, count, schedule, generator)
    return offset(noise, config, generator), timesteps


def samples_of(
    batch: Batch,
    noise: Tensor,
    timesteps: Tensor,
    text: PromptText,
    denoiser: Denoiser,
    config: TrainConfig,
    words: WordPlaces | None = None,
) -> Samples:
    """A batch with noise (b, c, h, w) at its timesteps (b,), its text, and where its words are."""
    # Before the timesteps leave the CPU: to read them back would wait for the device.
    weights = sample_weights(len(timesteps), batch.prior, config.prior_weight)
    if batch.balance is not None:
        weights = weights * batch.balance
    by_noise = loss_weights(config, timesteps, denoiser.alphas_cumprod, denoiser.prediction_type)
    if by_noise is not None:
        weights = weights * by_noise
    latents, noise, timesteps, masks, sizes = (
        tensor.to(denoiser.device)
        for tensor in (batch.latents_bchw, noise, timesteps, batch.masks_bhw, batch.sizes)
    )
    schedule, prediction_type = denoiser.alphas_cumprod, denoiser.prediction_type
    noisy = add_noise(latents, noise, timesteps, schedule)
    return Samples(
        noisy_latents_bchw=noisy,
        timesteps=timesteps,
        context=text.features.context,
        pooled=text.features.pooled,
        sizes=sizes,
        passing=text.passing,
        own=text.own,
        target_bchw=target(latents, noise, timesteps, schedule, prediction_type),
        masks_bhw=masks,
        weights=weights.to(noisy),
        word_rows=words and words.rows.to(denoiser.device),
        word_masks=words and words.masks.to(denoiser.device),
    )


def loss_of(
    projections: KeyValueProjections,
    samples: Samples,
    attention: WordAttention | None = None,
    attention_weight: float = 0.0,
) -> Tensor:
    """What some samples add to the loss of a step: denoising where a picture counts, prior
    preservation, and with `attention` how far words look beside their masks.
    """
    target = samples.target_bchw
    if samples.imitates is not None and (which := samples.imitates.nonzero().squeeze(1)).numel():
        which = which.to(target.device)
        given = (samples.noisy_latents_bchw, samples.timesteps, samples.context)
        more = (samples.pooled, samples.sizes)
        parts = [None if part is None else part[which.to(part.device)] for part in (*given, *more)]
        target = target.index_copy(0, which, projections.predict_unchanged(*parts))  # type: ignore[arg-type]
    with attention.catching() if attention else nullcontext():
        prediction = projections.predict(
            samples.noisy_latents_bchw,
            samples.timesteps,
            samples.context,
            samples.pooled,
            samples.sizes,
            passing=samples.passing,
            own=samples.own,
        )
    losses = sample_losses(prediction, target, samples.masks_bhw)
    if attention and samples.word_rows is not None and samples.word_masks is not None:
        places = WordPlaces(samples.word_rows, samples.word_masks)
        losses = losses + attention_weight * attention.terms(places)
    return (samples.weights * losses).sum()
