"""A Stable Diffusion pipeline in miniature: every part real, every weight random.

It draws noise, whatever it is told. It shows that the machinery works, not what it can learn.
"""

from __future__ import annotations

from typing import Any

import torch

from ..host.open_clip_vocabulary import clip_tokenizer


def random_pipeline(seed: int = 0, prediction_type: str = "epsilon", width: int = 768) -> Any:
    """A `StableDiffusionPipeline` of 30 million weights, most of them CLIP's vocabulary.

    The two-level UNet has the layer names of Stable Diffusion 1.x (`width` 768) or 2.x (1024). Only
    the generator of this call is used: the global random state is as before.
    """
    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=2,
            attention_head_dim=8,
            cross_attention_dim=width,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=width,
                intermediate_size=width,
                num_hidden_layers=2,
                num_attention_heads=width // 64,
                projection_dim=width,
            )
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
        )
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
