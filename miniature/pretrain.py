"""Trains the miniature: `python -m custom_diffusion.miniature.pretrain`.

The text encoder learns words first (`words.py`), then UNet and text encoder learn together, from
pictures that are drawn while they learn. Everything random comes from the seed.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..host.open_clip_vocabulary import END, START, clip_pieces, write_vocabulary
from ..trainer.objective import add_noise, target
from ..trainer.tokens import RARE_PIECES
from .drawing import draw
from .model import CONTEXT_LENGTH, LATENT_EDGE, TEXT_FILE, UNET_FILE, WEIGHTS, untrained_pipeline
from .words import WORD_STEPS, pretrain_words
from .world import captioned_scene, vocabulary

STEPS, BATCH_SIZE, LEARNING_RATE = 9300, 16, 1.5e-3
WARMUP_STEPS = 200
MOST_SIGNAL = 5.0
"""γ of the loss weights min(SNR, γ) / (SNR + 1) (Hang et al. 2023, for velocity): neither what no
caption can tell, in almost pure noise, nor textures, in almost none, shall rule the gradient.
"""
EMPTY_CAPTIONS = 0.1  # share of captions left out, for guidance
STRAY_WORDS = 0.05  # share of captions with a random piece of the vocabulary, mostly unknown
AVERAGING = 0.999  # of the weights that are kept, over the steps


def pretrain(
    folder: Path,
    steps: int = STEPS,
    word_steps: int = WORD_STEPS,
    seed: int = 0,
    save_every_steps: int = 0,
) -> None:
    """Trains the miniature from nothing and leaves its weights in `folder`, in half precision."""
    from diffusers.models.attention_processor import AttnProcessor

    folder.mkdir(parents=True, exist_ok=True)
    write_world_vocabulary(folder)
    pipeline = untrained_pipeline(folder, seed)
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    pretrain_words(text_encoder, pipeline.tokenizer, word_steps, seed)
    unet.set_attn_processor(AttnProcessor())  # on a CPU, for so few positions, the faster one
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    average = WeightAverage(parameters)
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, weight_decay=1e-2, betas=(0.9, 0.99), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    generator = torch.Generator().manual_seed(seed)
    alphas_cumprod = pipeline.scheduler.alphas_cumprod
    signal_to_noise = alphas_cumprod / (1 - alphas_cumprod)
    weights = signal_to_noise.clamp(max=MOST_SIGNAL) / (signal_to_noise + 1)

    started, recent = time.perf_counter(), 0.0
    captions = random.Random(f"captions {seed}")
    for step in range(1, steps + 1):
        latents, token_ids = _batch(pipeline, captions)
        noise = torch.randn(latents.shape, generator=generator)
        # Where structure forms: less often the later, noisier steps.
        share = 1 - torch.rand(len(latents), generator=generator).sqrt()
        timesteps = (share * len(alphas_cumprod)).long().clamp(max=len(alphas_cumprod) - 1)
        noisy = add_noise(latents, noise, timesteps, alphas_cumprod)
        context = text_encoder(token_ids).last_hidden_state
        prediction = unet(noisy, timesteps, encoder_hidden_states=context).sample
        wanted = target(latents, noise, timesteps, alphas_cumprod, "v")
        errors = (prediction - wanted).square().mean((1, 2, 3))
        loss = (errors * weights[timesteps]).mean()

        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.update(parameters)

        recent += (loss.item() - recent) / min(step, 100)
        if step % 200 == 0:
            minutes = (time.perf_counter() - started) / 60
            print(f"step {step} of {steps}, loss {recent:.4f}, {minutes:.1f} min", flush=True)
        if step == steps or (save_every_steps and step % save_every_steps == 0):
            with average.applied(parameters):
                _save(unet, folder / UNET_FILE)
                _save(text_encoder, folder / TEXT_FILE)


def write_world_vocabulary(folder: Path) -> None:
    """Writes the part of CLIP's vocabulary that splits the world's words as CLIP does.

    Any other word falls apart into smaller pieces, in the end letters.
    """
    pieces, merges = clip_pieces(vocabulary())
    pieces += [piece for piece in RARE_PIECES if piece not in pieces]
    write_vocabulary(folder, [*pieces, START, END], merges)


class WeightAverage:
    """An exponential moving average of weights: it draws better than the last step's."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._average = [parameter.detach().clone() for parameter in parameters]
        self._updates = 0

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor]) -> None:
        self._updates += 1
        share = 1 - min(AVERAGING, (self._updates + 1) / (self._updates + 10))
        torch._foreach_lerp_(self._average, list(parameters), share)

    @contextmanager
    @torch.no_grad()
    def applied(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """The average in place of the weights, while the context lasts."""
        parameters = list(parameters)
        own = [parameter.clone() for parameter in parameters]
        for parameter, mean in zip(parameters, self._average, strict=True):
            parameter.copy_(mean)
        try:
            yield
        finally:
            for parameter, weight in zip(parameters, own, strict=True):
                parameter.copy_(weight)


def _batch(pipeline: Any, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Latents (b, 4, h, w) and token ids (b, n) of freshly drawn pictures."""
    drawn = [captioned_scene(rng) for _ in range(BATCH_SIZE)]
    colors = draw([scene for scene, _ in drawn], LATENT_EDGE) * 2 - 1
    ids = [_token_ids(pipeline.tokenizer, caption, rng) for _, caption in drawn]
    return pipeline.vae.to_latents(colors), torch.tensor(ids)


def _token_ids(tokenizer: Any, caption: str, rng: random.Random) -> list[int]:
    """The padded words that the model is given: those of the caption, or none, or one too many."""
    start, *words, end = tokenizer(caption)["input_ids"]
    if rng.random() < EMPTY_CAPTIONS:
        words = []
    elif rng.random() < STRAY_WORDS:
        words.insert(rng.randrange(len(words)), rng.randrange(start))
    padded = [start, *words[: CONTEXT_LENGTH - 2]]
    return padded + [end] * (CONTEXT_LENGTH - len(padded))


def _rate(step: int, steps: int) -> float:
    """A linear start, then half a cosine down to nothing."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 + 0.5 * math.cos(math.pi * step / steps)


def _save(model: nn.Module, path: Path) -> None:
    save_file(
        {name: t.detach().half().contiguous() for name, t in model.state_dict().items()}, path
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--word-steps", type=int, default=WORD_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every-steps", type=int, default=0)
    options = parser.parse_args()
    pretrain(**vars(options))


if __name__ == "__main__":
    main()
