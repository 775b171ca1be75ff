"""A training loop that shares nothing with the pack but the order of its random numbers.

Plain modules with hooks, the whole embedding table, one caption after the other: slow and easy to
check by eye.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from custom_diffusion.concept.layers import layer_from_diffusers
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.data.batches import Batches, step_randomness
from custom_diffusion.trainer.data.latents import LatentBank
from custom_diffusion.trainer.data.training_concept import TrainingConcept
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from .tiny_models import VOCABULARY_SIZE, clip_tokenizer


def is_key_or_value(name: str) -> bool:
    return "attn2.to_k" in name or "attn2.to_v" in name


def layer_of(name: str) -> str:
    """The layer that a weight of diffusers' UNet belongs to."""
    return layer_from_diffusers(name.removesuffix(".weight"))


def tokenizer_that_knows(concepts: Sequence[TrainingConcept], plain: Any = None) -> Any:
    tokenizer = copy.deepcopy(plain or clip_tokenizer())
    tokenizer.add_tokens([concept.token for concept in concepts])
    return tokenizer


def naive_training(
    pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline,
    settings: TrainConfig,
    concepts: Sequence[TrainingConcept],
    banks: Sequence[LatentBank],
    learns: Callable[[str], bool] = is_key_or_value,
    *,
    learns_words: bool = True,
    adapt: Callable[[Any], Any] = lambda unet: unet,
    elsewhere: Any = None,
) -> tuple[list[float], dict[str, Tensor], Tensor]:
    """Losses, the change of every weight of the UNet that learns, and the rows of the tokens (of
    both text encoders of SDXL, side by side).

    `adapt` may put other modules into the UNet; `learns` says which parameters learn; `elsewhere`
    is a UNet whose keys and values other words than the concepts' own have, where they differ.
    """
    unet = adapt(copy.deepcopy(pipeline.unet).requires_grad_(False))
    xl, scheduler = isinstance(pipeline, StableDiffusionXLPipeline), pipeline.scheduler
    text_models = [copy.deepcopy(pipeline.text_encoder)]
    tokenizers = [tokenizer_that_knows(concepts, pipeline.tokenizer)]
    if xl:
        text_models.append(copy.deepcopy(pipeline.text_encoder_2))
        tokenizers.append(tokenizer_that_knows(concepts, pipeline.tokenizer_2))
    tables = []
    for text_model in text_models:
        text_model.requires_grad_(False)
        text_model.resize_token_embeddings(VOCABULARY_SIZE + len(concepts), mean_resizing=False)
        table = text_model.get_input_embeddings().weight
        table.data[VOCABULARY_SIZE:] = table.data[[42170, 47629][: len(concepts)]]
        tables.append(table.requires_grad_(True))
    others = [table.detach()[:VOCABULARY_SIZE].clone() for table in tables]
    trainable = [parameter for name, parameter in unet.named_parameters() if learns(name)]
    before = [parameter.detach().clone() for parameter in trainable]
    for parameter in trainable:
        parameter.requires_grad_(True)
    learning = [*trainable, *(tables if learns_words else [])]
    positions: list[Tensor] = []  # where keys and values pass gradients, of this step
    own: list[Tensor] = []  # where they change at all
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            base = (elsewhere or pipeline.unet).get_submodule(name).weight.detach()

            def cut(_: Any, inputs: tuple[Tensor], out: Tensor, base: Tensor = base) -> Tensor:
                if own:
                    out = torch.where(own[-1][..., None], out, inputs[0] @ base.T)
                return torch.where(positions[-1][..., None], out, out.detach())

            module.register_forward_hook(cut)
    optimizer = torch.optim.AdamW(
        learning, settings.learning_rate, weight_decay=settings.weight_decay, fused=False
    )
    losses = []
    for step in range(settings.steps):
        rng, generator = step_randomness(settings.seed, step)
        batch = Batches(banks, settings).of_step(step, rng, generator)
        noise = torch.randn(batch.latents_bchw.shape, generator=generator)
        timesteps = torch.randint(1000, (settings.batch_size,), generator=generator)
        each = [
            tokenizer(list(batch.prompts), padding="max_length", max_length=77, return_tensors="pt")
            for tokenizer in tokenizers
        ]
        keep = torch.ones(len(batch.prompts), 77, dtype=torch.bool)
        if settings.gradient_cut != "none":
            keep[:, 0] = False
        if settings.gradient_cut in ("start and padding", "own words"):
            keep &= each[0].attention_mask.bool()
        positions.append(keep)
        if settings.gradient_cut == "own words":
            ids = each[0].input_ids
            new = ids >= VOCABULARY_SIZE
            nouns = [tokenizers[0](concept.class_noun).input_ids[1:-1] for concept in concepts]
            assert all(len(noun) == 1 for noun in nouns)
            is_noun = torch.isin(ids, torch.tensor(nouns))
            own.append(new | (is_noun & new.roll(1, 1)))
        texts = [
            text_model(tokens.input_ids, output_hidden_states=True)
            for text_model, tokens in zip(text_models, each, strict=True)
        ]
        context, beside = texts[0].last_hidden_state, None
        if xl:
            context = torch.cat([text.hidden_states[-2] for text in texts], dim=-1)
            beside = {"text_embeds": texts[1].text_embeds, "time_ids": batch.sizes.float()}
        noisy = scheduler.add_noise(batch.latents_bchw, noise, timesteps)
        output = unet(noisy, timesteps, context, added_cond_kwargs=beside).sample
        wanted = noise
        if scheduler.config.prediction_type == "v_prediction":
            wanted = scheduler.get_velocity(batch.latents_bchw, noise, timesteps)
        samples = [
            ((output[n] - wanted[n]) ** 2 * batch.masks_bhw[n]).sum()
            / (4 * batch.masks_bhw[n].sum())
            for n in range(settings.batch_size)
        ]
        instances = settings.batch_size - batch.prior
        loss = sum(samples[:instances]) / instances
        if batch.prior:
            prior = sum(samples[instances:]) / batch.prior
            loss = loss + settings.prior_weight * prior
        optimizer.zero_grad()
        loss.backward()
        for table in tables:
            if table.grad is not None:
                table.grad[:VOCABULARY_SIZE] = 0
        if settings.max_gradient_norm:
            torch.nn.utils.clip_grad_norm_(learning, settings.max_gradient_norm)
        optimizer.step()
        for table, other in zip(tables, others, strict=True):
            table.data[:VOCABULARY_SIZE] = other
        losses.append(float(loss.detach()))
    names = [name for name, _ in unet.named_parameters() if learns(name)]
    changes = {
        name: parameter.detach() - old
        for name, parameter, old in zip(names, trainable, before, strict=True)
    }
    rows = torch.cat([table.detach()[VOCABULARY_SIZE:] for table in tables], dim=1)
    return losses, changes, rows
