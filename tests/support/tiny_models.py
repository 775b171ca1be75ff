"""Stable Diffusion pipelines small enough for unit tests: real diffusers parts, random weights.

Only widths and depths are small. What the pack depends on is as in Stable Diffusion 1.x or XL: the
text widths, CLIP's whole vocabulary, an autoencoder that divides by 8, SD's noise schedule.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from custom_diffusion.host.open_clip import vocabulary as open_clip_vocabulary
from custom_diffusion.trainer.data.captioned import CaptionedImage
from custom_diffusion.trainer.data.latents import EncodedView, LatentBank
from custom_diffusion.trainer.data.training_concept import TrainingConcept
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

CONTEXT_WIDTH = 768
XL_CONTEXT_WIDTH, XL_POOLED_WIDTH = 2048, 1280
VOCABULARY_SIZE = 49408
LATENT_EDGE = 8
"""Edge of the latents that the helpers make: pictures of 64 pixels."""
RESOLUTION = LATENT_EDGE * 8
TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
"""A model of open_clip, as its files of configuration say it."""


def tiny_pipeline(prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """A whole pipeline on the CPU in float32, all of it but the tokenizer the caller's own; the
    same seed gives the same weights.
    """
    vae, text_encoder, unet = copy.deepcopy(_drawn_models(seed))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=sd_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@cache
def _drawn_models(seed: int) -> tuple[AutoencoderKL, CLIPTextModel, UNet2DConditionModel]:
    """Drawn once, since a whole vocabulary takes longer to draw than a training of three steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return tiny_vae(), tiny_text_model(), tiny_unet()


def tiny_xl_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """The same of SDXL: two text encoders that pad in their own ways, transformers of two blocks,
    a UNet that reads a pooled text feature and six sizes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            vae=tiny_vae(scaling_factor=0.13025),
            text_encoder=tiny_text_model(),
            text_encoder_2=tiny_projected_text_model(),
            tokenizer=clip_tokenizer(),
            tokenizer_2=tokenizer_padding_with_zero(),
            unet=tiny_xl_unet(),
            scheduler=sd_scheduler(),
            add_watermarker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_unet() -> UNet2DConditionModel:
    """Two levels, one with cross-attention: six layers, twelve key and value projections."""
    return UNet2DConditionModel(
        sample_size=LATENT_EDGE,
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=CONTEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def tiny_xl_unet() -> UNet2DConditionModel:
    """Two levels, one with cross-attention: six transformers of two blocks, 24 projections."""
    return UNet2DConditionModel(
        sample_size=LATENT_EDGE,
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=XL_CONTEXT_WIDTH,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=XL_POOLED_WIDTH + 6 * 256,
        norm_num_groups=8,
    )


def tiny_unet_without_cross_attention() -> UNet2DModel:
    return UNet2DModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )


def tiny_text_model(layers: int = 2) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=CONTEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=12,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return CLIPTextModel(config).eval()


def tiny_projected_text_model(layers: int = 2) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=XL_POOLED_WIDTH,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=20,
        max_position_embeddings=77,
        hidden_act="gelu",
        projection_dim=XL_POOLED_WIDTH,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return CLIPTextModelWithProjection(config).eval()


def tiny_vae(scaling_factor: float = 0.18215) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=scaling_factor,
    ).eval()


def sd_scheduler(prediction_type: str = "epsilon") -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, padded as SD 1.x is; built once, so nobody may change it."""
    return open_clip_vocabulary.clip_tokenizer()


@cache
def tokenizer_padding_with_zero() -> CLIPTokenizer:
    """The same, padded as the second of SDXL is; nobody may change it either."""
    tokenizer = copy.deepcopy(clip_tokenizer())
    tokenizer.pad_token = "!"
    return tokenizer


def state(*modules: nn.Module) -> list[dict[str, Tensor]]:
    """A deep copy of the modules' weights, for `same_state`."""
    return [{k: v.clone() for k, v in module.state_dict().items()} for module in modules]


def same_state(before: list[dict[str, Tensor]], *modules: nn.Module) -> bool:
    """Whether the modules have the same weights as before, in order and to the bit."""
    return all(
        list(old) == list(new) and all(torch.equal(old[k], new[k]) for k in old)
        for old, new in zip(before, (m.state_dict() for m in modules), strict=True)
    )


def requires_grad_map(*modules: nn.Module) -> list[dict[str, bool]]:
    return [{n: p.requires_grad for n, p in module.named_parameters()} for module in modules]


def training_map(*modules: nn.Module) -> list[dict[str, bool]]:
    return [{n: m.training for n, m in module.named_modules()} for module in modules]


def cat_concept(images: int = 2, regularization: int = 0, **changes: Any) -> TrainingConcept:
    """`<new1> cat` with plain pictures."""
    return _plain_concept("<new1>", "cat", images, regularization, **changes)


def dog_concept(images: int = 2, regularization: int = 0, **changes: Any) -> TrainingConcept:
    """`<new2> dog`, to be taught together with the cat."""
    return _plain_concept("<new2>", "dog", images, regularization, **changes)


def _plain_concept(
    token: str, noun: str, images: int, regularization: int, **changes: Any
) -> TrainingConcept:
    picture = Image.new("RGB", (RESOLUTION, RESOLUTION), (200, 120, 40))
    return TrainingConcept(
        images=tuple(CaptionedImage(picture, f"photo of a {token} {noun}") for _ in range(images)),
        class_noun=noun,
        token=token,
        regularization=tuple(
            CaptionedImage(picture, f"{noun} number {n}") for n in range(regularization)
        ),
        **changes,
    )


class AveragingEncoder:
    """Latents are the averages of 8 × 8 pixels: the picture can be recognised in them."""

    def __init__(self) -> None:
        self.calls = 0

    def moments(self, image_chw: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        mean = torch.nn.functional.avg_pool2d(image_chw, 8)
        return torch.cat([mean, mean[:1]]), torch.full((4, *mean.shape[1:]), 0.5)


def random_bank(
    concept: TrainingConcept, views: int = 2, seed: int = 1, edge: int = LATENT_EDGE
) -> LatentBank:
    """Random latents for the pictures of a concept; every second view is a small one."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4, edge, edge)

    def view(prompt: str, number: int) -> EncodedView:
        small = number % 2 == 1
        mask = torch.ones(shape[1:])
        if small:
            mask[:3], mask[:, 5:] = 0, 0
        mean = torch.randn(shape, generator=generator)
        deviation = 0.1 * torch.rand(shape, generator=generator)
        prompt = f"far away {prompt}" if small else prompt
        sizes = 80, 100 + number, 3, 10 * number, RESOLUTION, RESOLUTION
        return EncodedView(mean, deviation, mask, prompt, sizes)

    return LatentBank(
        instances=tuple(
            tuple(view(image.caption, number) for number in range(views))
            for image in concept.images
        ),
        regularization=tuple(view(image.caption, number=0) for image in concept.regularization),
    )
