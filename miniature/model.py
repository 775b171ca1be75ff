"""The miniature's model: a Stable Diffusion 1.x pipeline in everything but size.

A `UNet2DConditionModel` and a `CLIPTextModel` of four and half a million weights, the noise
schedule and the padding of Stable Diffusion, and CLIP's word pieces as far as the miniature world
needs them. Its weights are trained by `pretrain.py` and lie in `weights/`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..concept.errors import IncompatibleModelError
from ..concept.tensors import read_tensors
from ..diffusion.latents import LATENT_PIXELS
from ..host.clip.text_encoder import text_transformer
from ..host.open_clip.vocabulary import read_tokenizer
from ..trainer.config import TrainConfig

WEIGHTS = Path(__file__).parent / "weights"
LATENT_EDGE = 24
PICTURE_EDGE = LATENT_EDGE * LATENT_PIXELS
CONTEXT_WIDTH = 128
CONTEXT_LENGTH = 32
CONFIG = TrainConfig(
    steps=300,
    batch_size=4,
    learning_rate=5e-4,
    resolution=PICTURE_EDGE,
    augment=False,
    flip=False,
    preview_every_steps=0,
)
"""The paper's recipe in miniature; steps and learning rate differ. Mirrored views would teach a
split look the wrong way round as well. Augmented views tell their size by `far away` and `zoomed
in`, words that this model has never read, and a pattern of few latents is lost in the small ones.
"""
EVERY_WORD = replace(CONFIG, gradient_cut="start and padding", batch_size=8, learning_rate=1e-3)
"""The same for what learns through every word: half of a batch is regularization then."""
SAMPLING_STEPS, GUIDANCE = 15, 2.5
UNET_FILE, TEXT_FILE = "unet.safetensors", "text_encoder.safetensors"


def miniature_pipeline(weights: Path = WEIGHTS) -> Any:
    """The trained miniature as a `StableDiffusionPipeline`, in float32 on the CPU."""
    if not (weights / UNET_FILE).is_file():
        raise IncompatibleModelError(
            f"The miniature's weights are not at {weights}. Get the project's whole repository, or "
            f"train them with `python -m custom_diffusion.miniature.pretrain`."
        )
    pipeline = untrained_pipeline(weights)
    pipeline.unet.load_state_dict(_float32(weights / UNET_FILE))
    text_transformer(pipeline.text_encoder).load_state_dict(_float32(weights / TEXT_FILE))
    return pipeline


def untrained_pipeline(vocabulary: Path = WEIGHTS, seed: int = 0) -> Any:
    """The same with random weights. `vocabulary` is the folder of vocab.json and merges.txt.

    The process's random state is as before afterwards.
    """
    from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    words = len(json.loads((vocabulary / "vocab.json").read_text(encoding="utf-8")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=LATENT_EDGE,
            block_out_channels=(32, 64, 96),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            attention_head_dim=(1, 2, 3),  # diffusers' name for the number of heads
            norm_num_groups=8,
            cross_attention_dim=CONTEXT_WIDTH,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=words,
                hidden_size=CONTEXT_WIDTH,
                intermediate_size=4 * CONTEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=CONTEXT_LENGTH,
                projection_dim=CONTEXT_WIDTH,
                bos_token_id=words - 2,
                eos_token_id=words - 1,
                pad_token_id=words - 1,
            )
        )
    # Stable Diffusion's own noise ends at a beta of 0.012. Through that so few latents still show
    # their mean, and the background would come from the noise instead of the prompt.
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=BlockAutoencoder(),
        text_encoder=text_encoder,
        tokenizer=read_tokenizer(vocabulary, CONTEXT_LENGTH),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class BlockAutoencoder(nn.Module):
    """The miniature's autoencoder: a latent is the mean colour of 8 x 8 pixels.

    It needs no training and loses no colour. The three channels of a colour become the four of a
    latent through a tetrahedron's corners, so that all four matter equally. It answers as
    diffusers' `AutoencoderKL` does, as far as the pack asks.
    """

    def __init__(self) -> None:
        super().__init__()
        corners = torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2
        self.corners: Tensor
        self.register_buffer("corners", corners, persistent=False)
        self.config = SimpleNamespace(scaling_factor=1.0, block_out_channels=(4,) * 4)

    @property
    def dtype(self) -> torch.dtype:
        return self.corners.dtype

    @property
    def device(self) -> torch.device:
        return self.corners.device

    def encode(self, images_bchw: Tensor) -> Any:
        """Pictures (b, 3, h, w) in -1..1 → an object whose `latent_dist` has `mean` and `std`."""
        mean = self.to_latents(F.avg_pool2d(images_bchw, LATENT_PIXELS))
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.zeros_like(mean)))

    def decode(self, latents_bchw: Tensor) -> Any:
        """Latents (b, 4, h, w) → an object whose `sample` is the pictures (b, 3, 8 h, 8 w)."""
        colors = self.to_colors(latents_bchw)
        smooth = F.interpolate(colors, scale_factor=LATENT_PIXELS, mode="bicubic")
        return SimpleNamespace(sample=smooth.clamp(-1, 1))

    def to_latents(self, colors_bchw: Tensor) -> Tensor:
        """One colour in -1..1 for every latent."""
        return torch.einsum("bchw,cl->blhw", colors_bchw, self.corners)

    def to_colors(self, latents_bchw: Tensor) -> Tensor:
        return torch.einsum("blhw,cl->bchw", latents_bchw, self.corners)


def _float32(file: Path) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in read_tensors(file)[0].items()}
