"""Trains the miniature: `python -m custom_diffusion.miniature.pretrain`.

The text encoder learns words first (`words.py`) and is frozen then, as Stable Diffusion's is. The
UNet learns from pictures that are drawn meanwhile. Everything random comes from the seed.
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

from ..diffusion.noise import add_noise, target
from ..host.clip.text_encoder import text_transformer
from ..host.open_clip.vocabulary import END, START, clip_pieces, write_vocabulary
from ..trainer.learning.tokens import RARE_PIECES
from .drawing import draw
from .model import LATENT_EDGE, TEXT_FILE, UNET_FILE, WEIGHTS, untrained_pipeline
from .words import WORD_STEPS, padded_ids, pretrain_words, thinned
from .world import SHAPES, Scene, captioned_scene, vocabulary

STEPS, BATCH_SIZE, LEARNING_RATE = 10000, 16, 1.5e-3
WARMUP_STEPS = 200
GROUNDED_SHARE, GROUNDING = 0.4, 0.01
"""For this part of the steps the loss of `grounding.py` counts, less and less."""
MOST_SIGNAL = 5.0
"""γ of the loss weights √(min(SNR, γ) / (SNR + 1)): min-SNR (Hang et al. 2023, for velocity), but
for the root. Without the root almost nothing is learnt at much noise, where only the caption can
tell what to draw: a few large objects show through noise that would hide a photo.
"""
AVERAGING = 0.999  # of the weights that are kept, over the steps


def pretrain(
    folder: Path,
    steps: int = STEPS,
    word_steps: int = WORD_STEPS,
    seed: int = 0,
    save_every_steps: int = 0,
) -> None:
    """Trains the miniature from nothing and leaves its weights in `folder`, in half precision."""
    from .grounding import WatchedAttention, grounding_loss

    folder.mkdir(parents=True, exist_ok=True)
    write_world_vocabulary(folder)
    pipeline = untrained_pipeline(folder, seed)
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    pretrain_words(text_encoder, pipeline.tokenizer, word_steps, seed)
    text_encoder.requires_grad_(False)
    _save(text_transformer(text_encoder), folder / TEXT_FILE)
    attention = WatchedAttention()  # for so few positions faster than the fused one on a CPU
    unet.set_attn_processor(attention)
    nouns = torch.tensor([pipeline.tokenizer(shape)["input_ids"][1] for shape in SHAPES])
    parameters = list(unet.parameters())
    average = WeightAverage(parameters)
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, weight_decay=1e-2, betas=(0.9, 0.99), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    generator = torch.Generator().manual_seed(seed)
    alphas_cumprod = pipeline.scheduler.alphas_cumprod
    signal_to_noise = alphas_cumprod / (1 - alphas_cumprod)
    weights = (signal_to_noise.clamp(max=MOST_SIGNAL) / (signal_to_noise + 1)).sqrt()

    started, recent = time.perf_counter(), 0.0
    captions = random.Random(f"captions {seed}")
    for step in range(1, steps + 1):
        scenes, latents, token_ids = _batch(pipeline, captions)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(len(alphas_cumprod), (len(latents),), generator=generator)
        noisy = add_noise(latents, noise, timesteps, alphas_cumprod)
        grounding = GROUNDING * (1 - step / (GROUNDED_SHARE * steps))
        attention.watching = grounding > 0
        context = text_encoder(token_ids).last_hidden_state
        prediction = unet(noisy, timesteps, encoder_hidden_states=context).sample
        wanted = target(latents, noise, timesteps, alphas_cumprod, "v")
        errors = (prediction - wanted).square().mean((1, 2, 3))
        loss = (errors * weights[timesteps]).mean()
        recent += (loss.item() - recent) / min(step, 100)
        if attention.watching:
            shares = attention.take_shares()
            loss = loss + grounding * grounding_loss(shares, scenes, token_ids, nouns)

        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.update(parameters)

        if step % 200 == 0:
            minutes = (time.perf_counter() - started) / 60
            print(f"step {step} of {steps}, loss {recent:.4f}, {minutes:.1f} min", flush=True)
        if step == steps or (save_every_steps and step % save_every_steps == 0):
            with average.applied(parameters):
                _save(unet, folder / UNET_FILE)


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


def _batch(pipeline: Any, rng: random.Random) -> tuple[list[Scene], Tensor, Tensor]:
    """New scenes, their pictures' latents (b, 4, h, w) and their captions' token ids (b, n)."""
    drawn = [captioned_scene(rng) for _ in range(BATCH_SIZE)]
    scenes = [scene for scene, _ in drawn]
    colors = draw(scenes, LATENT_EDGE) * 2 - 1
    captions = [thinned(caption, rng) for _, caption in drawn]
    return scenes, pipeline.vae.to_latents(colors), padded_ids(pipeline.tokenizer, captions, rng)


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
